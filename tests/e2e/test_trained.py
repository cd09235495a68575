"""Checkpoints that were trained with SepLLM, in the authors' format, in real vLLM."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import engine
from tests.support.oracle import TOLERANCE, Rule, differences
from tests.support.tiny_models import random_prompts
from tests.support.trained_checkpoint import SEPARATORS, write_trained
from tests.support.trained_fields import BY_LAYER

pytestmark = pytest.mark.slow

H_T = BY_LAYER | {
    "prefill_loc_win_size_list": [2048, 64, 64, 2048],
    "generate_win_loc_size_list": [2048, 64, 64, 2048],
}
# name -> fields of the checkpoint, the user's settings, the rule that the oracle applies
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Rule]] = {
    "first and last layer full": (
        H_T,
        {},
        Rule(3, 64, frozenset(SEPARATORS), full_layers=frozenset({0, 3})),
    ),
    "StreamingLLM, and the user's window": (
        {"streamingLLM": True, "init_tok_max_idx": 3},
        {"window": 28},
        Rule(4, 28, frozenset()),
    ),
}


def prompts() -> list[list[int]]:
    """Far beyond the window."""
    return random_prompts(40, 300, 700)


@pytest.mark.parametrize("name", CASES)
def test_engine_equals_the_mask_it_was_trained_with(name: str, tmp_path: Path) -> None:
    """Proves that weights with the renamed prefix and the policy in config.json give the tokens of
    GPT-NeoX under that mask, that the user's own settings win, and that another mask would show."""
    fields, user, rule = CASES[name]
    trained, plain = write_trained(tmp_path, **fields)
    with engine(
        trained,
        attention_backend="sepllm",
        additional_config={"sepllm": user},
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=1 << 26,
    ) as made:
        config = made.engine.vllm_config.additional_config["sepllm"]
        answers = made.generate(prompts(), 24)
    assert (config["initial_tokens"], config["window"]) == (rule.initial_tokens, rule.window)
    assert set(config["separators"]) == rule.separator_ids
    assert set(config["full_layers"]) == rule.full_layers
    num_other, largest = differences(plain, prompts(), answers, rule)
    print(f"{name}: {num_other} tokens differ, log-probabilities by {largest:.1e}")
    assert num_other == 0
    assert largest < TOLERANCE
    num_other, largest = differences(plain, prompts()[-1:], answers[-1:], None)
    assert num_other > 0
    assert largest > 100 * TOLERANCE
