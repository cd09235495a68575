"""Every kind of attention that a model can have, as a tiny random model, against the oracle."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import engine
from tests.support.oracle import TOLERANCE, differences, rule_of
from tests.support.tiny_engine import ENGINE, prompts
from tests.support.tiny_models import write_weights

pytestmark = pytest.mark.slow

MAX_TOKENS = 8
INITIAL_TOKENS = 40

# kind of tiny model -> its layers that must become sepllm, and what it stands for
KINDS = {
    "llama": (2, "Llama, GQA"),
    "llama-mha": (2, "Llama, MHA"),
    "llama-mqa": (2, "Llama, MQA"),
    "qwen2": (2, "Qwen2"),
    "qwen3": (2, "Qwen3"),
    "mistral-full": (2, "Mistral without sliding window"),
    "phi": (2, "Phi"),
    "phi3": (2, "Phi-3"),
    "gemma": (2, "Gemma"),
    "gemma2": (2, "Gemma-2: sliding and full layers, soft-capped scores"),
    "gemma3": (1, "Gemma-3: sliding and full layers"),
    "gpt-neox": (2, "GPT-NeoX"),
    "gpt-oss": (1, "GPT-OSS: attention sinks, sliding and full layers, experts"),
}


@contextmanager
def transformers_restored() -> Iterator[None]:
    """vLLM runs Phi and GPT-NeoX through transformers and decorates its classes: undo that."""
    from transformers import GPTNeoXModel, PhiModel

    def own(model: type) -> dict[str, Any]:
        return {name: vars(model)[name] for name in ("__init__", "__call__") if name in vars(model)}

    before = {model: (model.__bases__, own(model)) for model in (GPTNeoXModel, PhiModel)}
    try:
        yield
    finally:
        for model, (bases, members) in before.items():
            for name in own(model).keys() - members.keys():
                delattr(model, name)
            for name, member in members.items():
                setattr(model, name, member)
            model.__bases__ = bases


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.compatibility(title, "exact"))
        for kind, (_, title) in KINDS.items()
    ],
)
def test_architecture_equals_the_dense_mask(kind: str, tmp_path: Path) -> None:
    """Proves greedy tokens and log-probabilities against Hugging Face in float32, for chunks and
    decode, one request with initial tokens of its own, and that sliding-window layers keep vLLM's
    own attention."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    from vllm_sepllm.integration.worker.cpu.impl import SepLLMCPUImpl

    path = write_weights(kind, tmp_path)
    with transformers_restored(), engine(path, **ENGINE, skip_tokenizer_init=True) as made:
        rule = rule_of(made)
        choices = [*[None] * len(prompts()), {"sepllm_initial_tokens": INITIAL_TOKENS}]
        *answers, own = made.generate([*prompts(), prompts()[0]], MAX_TOKENS, choices=choices)
        layers = get_layers_from_vllm_config(made.engine.vllm_config, Attention)
        ours = [n for n, layer in layers.items() if isinstance(layer.impl, SepLLMCPUImpl)]
    assert len(ours) == KINDS[kind][0]
    num_other, largest = differences(path, prompts(), answers, rule)
    num_full, largest_full = differences(path, prompts(), answers, None)
    print(f"{kind}: {num_other} tokens differ, log-probabilities by {largest:.1e}")
    print(f"{kind}, full attention: {num_full} differ, by {largest_full:.1e}")
    assert num_other == 0
    assert largest < TOLERANCE
    assert num_full > 0
    assert largest_full > 100 * TOLERANCE
    mine = replace(rule, initial_tokens=INITIAL_TOKENS)
    num_other, largest = differences(path, prompts()[:1], [own], mine)
    assert num_other == 0
    assert largest < TOLERANCE
    assert own.logprobs != answers[0].logprobs
