"""Two LoRA adapters and the model itself in one batch, each as the oracle says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.support.engine import engine
from tests.support.oracle import TOLERANCE, differences, rule_of
from tests.support.tiny_engine import ENGINE
from tests.support.tiny_models import random_prompts

pytestmark = pytest.mark.slow

RANK = 4
ALPHA = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_adapter(model: Path, adapter: Path, merged: Path, seed: int) -> None:
    """Write a random adapter for ``model``, and the model with the adapter's product added."""
    numbers = torch.Generator().manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tensors = {}
    for name, weight in base.named_parameters():
        if any(f"{target}.weight" in name for target in TARGETS):
            low = torch.randn(RANK, weight.shape[1], generator=numbers) * 0.2
            high = torch.randn(weight.shape[0], RANK, generator=numbers) * 0.2
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{prefix}.lora_A.weight": low, f"{prefix}.lora_B.weight": high}
            weight.data += ALPHA / RANK * high @ low
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    base.save_pretrained(merged)


@pytest.mark.compatibility(
    "LoRA, several adapters at once", "exact, each with its own prefix cache"
)
def test_two_adapters_at_once(tiny_llama_path: Path, tmp_path: Path) -> None:
    """Proves that KV of one adapter never serves another, in a batch and from the prefix cache:
    the second round finds each prompt's checkpoint, and its own alone."""
    from vllm.lora.request import LoRARequest

    paths = [tiny_llama_path]
    loras: list[LoRARequest | None] = [None]
    for number in (1, 2):
        adapter, merged = tmp_path / f"adapter-{number}", tmp_path / f"merged-{number}"
        write_adapter(tiny_llama_path, adapter, merged, number)
        paths.append(merged)
        loras.append(LoRARequest(f"adapter-{number}", number, str(adapter)))
    (prompt,) = random_prompts(150)
    # a slot more than adapters: vLLM 0.32 on CPU adds the last slot's to requests without adapter
    settings = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
    with engine(tiny_llama_path, **ENGINE, **settings, skip_tokenizer_init=True) as made:
        rule = rule_of(made)
        rounds = [made.generate([prompt] * 3, 8, loras=loras) for _ in range(2)]
    assert len({tuple(answer.token_ids) for answer in rounds[0]}) == 3
    assert [answer.num_cached_tokens for answer in rounds[0]] == [0, 0, 0]
    assert [answer.num_cached_tokens for answer in rounds[1]] == [128, 128, 128]
    for answers in rounds:
        for path, answer in zip(paths, answers, strict=True):
            num_other, largest = differences(path, [prompt], [answer], rule)
            print(f"{path.name}: {num_other} tokens differ, log-probabilities by {largest:.1e}")
            assert num_other == 0
            assert largest < TOLERANCE
