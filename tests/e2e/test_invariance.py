"""Invariant 1: the same request gives the same tokens, whatever else the engine does."""

from pathlib import Path

import pytest

from tests.support.engine import Watch, assert_same, engine
from tests.support.tiny_engine import tiny_sepllm
from tests.support.tiny_models import tiny_text

pytestmark = pytest.mark.slow

# at most 4 + 64 + 60 entries: 4 blocks
SEPLLM = tiny_sepllm(window=64, max_separators=60)


@pytest.mark.compatibility("Preemption, batching, chunked prefill", "do not show in any answer")
def test_preemption_batch_mates_and_chunks_do_not_show(tiny_llama_path: Path) -> None:
    """Proves it for a pool that preempts at least 20 times, and for batches of 1 and of 28.

    Most prompts start with one block and grow to four while they decode, in a pool of eleven.
    """
    lengths = [25, 300, 5, 20, 90, 28, 10, 500, 15, 22, 18, 130, 27, 8, 30, 12]
    prompts = [tiny_text(1000 * i, n) for i, n in enumerate([*lengths, *lengths[2:14]])]
    max_tokens = 150
    with engine(tiny_llama_path, **SEPLLM, max_num_batched_tokens=2048) as made:
        large = made.generate(prompts, max_tokens)
        alone = [made.generate([p], max_tokens)[0] for p in prompts[1:16:6]]
    watch = Watch()
    with engine(
        tiny_llama_path, **SEPLLM, max_num_batched_tokens=128, num_gpu_blocks_override=12
    ) as made:
        small = made.generate(prompts, max_tokens, watch=watch)
    print(f"{watch.num_preemptions} preemptions")
    assert watch.num_preemptions >= 20
    assert_same(small, large)
    assert_same(alone, large[1:16:6])
