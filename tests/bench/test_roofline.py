"""The cost model against sums done by hand and by brute force."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vllm_sepllm.bench import roofline
from vllm_sepllm.bench.gpus import GPUS
from vllm_sepllm.config import MAX_SENTENCES, SepLLMConfig
from vllm_sepllm.policy.visibility import Policy, visible_mask

ROOT = Path(__file__).resolve().parents[2]
LLAMA, QWEN = roofline.MODELS


def test_sizes_of_the_models() -> None:
    """8.03 and 32.8 billion weights; 128 and 256 KiB of KV a token."""
    totals = [m.layer_weights + 2 * m.head_weights for m in roofline.MODELS]
    assert totals == pytest.approx([8.03e9, 32.76e9], rel=1e-3)
    assert (LLAMA.kv_bytes, QWEN.kv_bytes) == (128 << 10, 256 << 10)


def test_the_policy_is_the_default_one() -> None:
    """Which the cost model spells out: it has no dependency on the configuration."""
    config = SepLLMConfig()
    assert Policy(config.initial_tokens, config.window, MAX_SENTENCES) == roofline.POLICY


def test_keys_by_hand() -> None:
    """a=4, n=256 and every tenth far token a separator."""
    policy = Policy(4, 256)
    assert roofline.num_keys(99, None, 0.1) == 100
    assert roofline.num_keys(99, policy, 0.1) == 100
    assert roofline.num_keys(1259, policy, 0.1) == 260 + 100
    assert roofline.num_keys(1259, Policy(4, 256, 30), 0.1) == 260 + 30


@pytest.mark.parametrize("max_separators", [None, 3])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_keys_are_those_of_the_rule(density, max_separators) -> None:
    policy = Policy(3, 8, max_separators)
    mask = visible_mask(policy, np.full(60, density > 0))
    keys = [roofline.num_keys(i, policy, density) for i in range(60)]
    assert keys == mask.sum(axis=1).tolist()


def test_prefill_pairs_of_single_query_tiles_are_the_visible_pairs() -> None:
    policy = Policy(3, 8)
    mask = visible_mask(policy, np.ones(60, dtype=bool))
    assert roofline.prefill_pairs(60, policy, 1.0, 1) == mask.sum()
    assert roofline.prefill_pairs(60, None, 1.0, 1) == 60 * 61 / 2


def test_decode_by_hand() -> None:
    """One step of one request reads every weight and its keys, and two FLOPs a weight."""
    gpu = GPUS["h100"]
    row = roofline.decode_cost(LLAMA, gpu, 1, 1260, 1, Policy(4, 256), 0.1)
    weights = LLAMA.layer_weights + LLAMA.head_weights
    assert row.bytes_moved == pytest.approx(2 * weights + 360 * (128 << 10))
    assert row.attention_flops == 360 * 4 * 32 * 32 * 128
    assert row.flops == pytest.approx(2 * weights + row.attention_flops)
    assert row.bound_ms == pytest.approx(row.bytes_moved / gpu.bandwidth * 1e3)
    assert (row.limited_by, row.fits) == ("memory", True)


def test_a_window_longer_than_the_prompt_costs_what_full_attention_costs() -> None:
    gpu, wide = GPUS["h100"], Policy(4, 8192)
    full = roofline.prefill_cost(LLAMA, gpu, 1, 4096, None, 0.13)
    same = roofline.prefill_cost(LLAMA, gpu, 1, 4096, wide, 0.13)
    assert (same.flops, same.bytes_moved) == (full.flops, full.bytes_moved)


@pytest.mark.parametrize("as_json", [False, True])
def test_every_row_says_that_it_is_a_model(as_json) -> None:
    command = [sys.executable, "-m", "vllm_sepllm.bench.roofline", "--gpu", "mi300x"]
    command += ["--batch", "1", *(["--json"] if as_json else [])]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if as_json:
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == 2 * 3 * 4
        assert {row["kind"] for row in rows} == {roofline.LABEL}
        return
    assert roofline.LABEL in text
    rows = [line for line in text.splitlines() if "Llama" in line or "Qwen" in line]
    assert len(rows) == 2 * 3 * 4
    assert all("modelled" in row for row in rows)
