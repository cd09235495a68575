"""Invariant 3: a request holds the blocks of its compact length, also inside a long prefill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engine import Watch, engine, sepllm
from tests.support.measured import Number
from tests.support.oracle import Rule, rule_of, separators
from tests.support.rule import num_kept

pytestmark = pytest.mark.slow

BLOCK = 32
DUMMY = {"load_format": "dummy", "block_size": BLOCK, "max_model_len": 40960}
POLICIES = {
    # 256 as in the figures of the design; a + n = 260 is no whole number of blocks
    "paper": {"window": 256, "separators": "paper"},
    "defaults": {},
}


def compact_blocks(rule: Rule, is_separator: list[bool], num_tokens: int) -> int:
    """ceil(compact length / block size), counted from the definition."""
    return -(-num_kept(rule, is_separator, num_tokens) // BLOCK)


@pytest.mark.parametrize("policy", POLICIES)
def test_blocks_are_those_of_the_compact_length_at_every_step(
    policy: str, tiny_path: Path, text_ids: list[int], number: Number
) -> None:
    """Proves it for 2K, 8K and 32K tokens of English, and that chunk sizes do not matter."""
    prompts = [text_ids[:length] for length in (2048, 8192, 32768)]
    peaks = {}
    for chunk in (512, 2048):
        selected = sepllm(**POLICIES[policy])
        with engine(tiny_path, **DUMMY, **selected, max_num_batched_tokens=chunk) as made:
            rule = rule_of(made)
            for prompt in prompts:
                watch = Watch()
                (answer,) = made.generate([prompt], 8, watch=watch, logprobs=None)
                is_separator = separators(torch.tensor(prompt + answer.token_ids), rule).tolist()
                for num_tokens, (held,) in watch.holdings:
                    assert held == compact_blocks(rule, is_separator, num_tokens)
                peak = max(held for _, (held,) in watch.holdings)
                assert peak == compact_blocks(rule, is_separator, len(prompt) + 7)
                peaks[chunk, len(prompt)] = peak
    for prompt in prompts:
        full = -(-(len(prompt) + 7) // BLOCK)
        number(f"blocks of {len(prompt)} tokens", f"{full} in full, {peaks[512, len(prompt)]} kept")
    assert {n: p for (c, n), p in peaks.items() if c == 512} == {
        n: p for (c, n), p in peaks.items() if c == 2048
    }
    # full attention would hold 65, 257 and 1025
    most = {"paper": (19, 54, 189), "defaults": (19, 24, 24)}[policy]
    assert all(peaks[512, len(p)] <= bound for p, bound in zip(prompts, most, strict=True))


def most_decoding(path: Path, prompts: list[list[int]], **arguments: Any) -> int:
    watch = Watch()
    with engine(
        path,
        **DUMMY | {"max_model_len": 8704},
        **arguments,
        num_gpu_blocks_override=1101,  # vLLM keeps one back
        max_num_batched_tokens=8704,
        max_num_seqs=64,
    ) as made:
        made.generate(prompts, 400, watch=watch, max_steps=120, logprobs=None)
    return watch.max_decoding


def test_one_pool_decodes_five_times_as_many_requests(
    tiny_path: Path, excerpt: Callable[[int, int], list[int]], number: Number
) -> None:
    """Proves real memory given back: 60 requests of 8K + 400 tokens in 1100 blocks of 32."""
    prompts = [excerpt(500 * i, 8192) for i in range(60)]
    stock = most_decoding(tiny_path, prompts, enable_prefix_caching=False)
    ours, defaults = (most_decoding(tiny_path, prompts, **sepllm(**p)) for p in POLICIES.values())
    number(
        "decoding at once in 1100 blocks",
        f"{ours} with the paper's rule, {defaults} with the defaults, {stock} with stock vLLM",
    )
    # a prompt is 256 blocks and its answer begins another
    assert stock == 1100 // 257
    assert ours >= 5 * stock
    assert defaults >= 8 * stock


def test_a_request_that_the_pool_cannot_hold_is_refused_at_start_up(tiny_path: Path) -> None:
    """Proves that no request can be admitted that would preempt itself for ever."""
    arguments = DUMMY | sepllm(window=252, separators="extended", max_separators=256)
    # 4 + 252 + 256 entries are 16 blocks; one more is vLLM's null block
    with (
        pytest.raises(ValueError, match="To serve at least one request"),
        engine(tiny_path, **arguments, num_gpu_blocks_override=16),
    ):
        pytest.fail("it started")
    with engine(tiny_path, **arguments, num_gpu_blocks_override=17) as made:
        # what the start-up line says: 17 blocks, 16 for the longest request
        assert made.engine.vllm_config.cache_config.kv_cache_max_concurrency == 17 / 16
        separators = made.engine.vllm_config.additional_config["sepllm"]["separators"]
        worst = [separators[0]] * 3000
        (answer,) = made.generate([worst], 200)
        assert len(answer.token_ids) == 200
