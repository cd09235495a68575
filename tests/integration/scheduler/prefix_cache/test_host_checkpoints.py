"""Evicted prefixes come back from host memory; vLLM's real schedulers and pools, no model.

test_machine.py says what is in the blocks.
"""

import random
from pathlib import Path

import pytest

from tests.support.schedulers import (
    FULL,
    Run,
    Setting,
    make_scheduler,
    random_tokens,
    starts,
    write_model,
)
from vllm_sepllm.integration.wire.plan import attached_plan
from vllm_sepllm.integration.wire.report import PolicyUsage
from vllm_sepllm.policy.step.plan import HostTransfers

KINDS = ("sync", "async", "drafts")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"))


def reused(run: Run, prompts: list[list[int]]) -> int:
    """Tokens that prompts found, one after another, each with a turn that goes on from it."""
    names = []
    for prompt in prompts:
        names.append(run.arrive(prompt, 4))
        run.finish()
    return sum(run.num_reused[name] for name in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [24, 900])
def test_prompts_find_what_the_pool_has_forgotten(model: Path, kind: str, length: int) -> None:
    """Twenty prompts in a pool that holds a few, twice: short ones are shared by blocks."""
    pick = random.Random(length)
    prompts = [random_tokens(pick, length + 40) for _ in range(20)]
    policy = (("window", 124), ("checkpoint_interval", 256))
    found = {}
    for host_blocks in (0, 1000):
        run = Run(Setting(model, kind, 40, policy=policy, host_blocks=host_blocks))
        reused(run, prompts)
        found[host_blocks] = reused(run, [prompt[: length + 36] for prompt in prompts])
        assert run.pool.get_num_free_blocks() == run.pool.num_gpu_blocks - 1
    print(found)
    longest = (length + 35) // 32 * 32
    assert found[1000] >= 20 * longest
    assert found[0] < 0.3 * found[1000]


def test_metrics_count_what_goes_and_comes_back(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole states, though a prompt finds less than the whole of what it begins with."""
    run = Run(Setting(model, num_blocks=40, host_blocks=1000))
    cache, saved, loaded = run.scheduler._prefix_cache, [], []
    take = cache.take_transfers

    def take_and_count() -> HostTransfers | None:
        transfers = take()
        if transfers is not None:
            saved.extend(transfers.saves)
            loaded.extend(transfers.loads)
        return transfers

    monkeypatch.setattr(cache, "take_transfers", take_and_count)
    run.scheduler._usage = run.scheduler._coordinator.watch(8192)
    prompts = [random_tokens(random.Random(n), 900) for n in range(20)]
    reused(run, prompts)
    (before,) = run.scheduler._usage.report().values()
    assert (before.restored_tokens, before.restored_bytes, loaded) == (0, 0, [])
    assert before.saved_bytes == len(saved) * FULL.page_size_bytes > 0
    assert before.host_memory_usage_perc == len({*saved}) / 1000
    saved.clear()
    found = reused(run, prompts[:3])
    (after,) = run.scheduler._usage.report().values()
    assert after.restored_tokens == found > 3 * 700
    assert after.restored_bytes == len(loaded) * FULL.page_size_bytes > 0
    assert after.saved_bytes == len(saved) * FULL.page_size_bytes > 0


@pytest.mark.parametrize("host_blocks", [12, 60])
def test_metrics_know_how_full_host_memory_is_and_by_whom(model: Path, host_blocks: int) -> None:
    """Where checkpoints of two windows push each other out, and none is left after a reset."""
    pick = random.Random(0)
    run = Run(Setting(model, num_blocks=40, host_blocks=host_blocks))
    host, total = run.scheduler._prefix_cache.host, 0.0
    usage = run.scheduler._coordinator.watch(8192)
    assert host is not None
    for number in range(40):
        run.arrive(random_tokens(pick, 900), 4, sepllm_window=50 if number % 3 else 28)
        run.finish()
        report = usage.report()
        slots = {window: set[int]() for window in (28, 50)}
        for each in host._saved.values():
            slots[each.source.window] |= each.all_slots
        for window, held in slots.items():
            found = report.get(str(window), PolicyUsage()).host_memory_usage_perc
            assert found == len(held) / host_blocks
            total += found
    assert total > 5, "it was in use"
    assert run.scheduler.reset_prefix_cache()
    assert [each.host_memory_usage_perc for each in usage.report().values()] == [0, 0]


def test_a_reset_empties_host_memory(model: Path) -> None:
    """The weights may be others from now on."""
    pick = random.Random(0)
    prompts = [random_tokens(pick, 900) for _ in range(20)]
    run = Run(Setting(model, num_blocks=40, host_blocks=1000))
    reused(run, prompts)
    assert run.scheduler.reset_prefix_cache()
    assert reused(run, prompts[:1]) == 0


def test_the_least_recently_used_goes_first(model: Path) -> None:
    pick = random.Random(0)
    prompts = [random_tokens(pick, 900) for _ in range(20)]
    run = Run(Setting(model, num_blocks=40, host_blocks=60))
    reused(run, prompts)
    assert reused(run, prompts[-3:]) > 3 * 700
    assert reused(run, prompts[:1]) == 0


@pytest.mark.parametrize(("watermark", "is_back"), [(0.0, True), (0.65, False)])
def test_nothing_is_loaded_for_a_request_that_may_not_start_from_it(
    model: Path, watermark: float, is_back: bool
) -> None:
    """vLLM's watermark keeps blocks free of waiting requests while others run."""
    pick = random.Random(0)
    policy = (("window", 124), ("checkpoint_interval", 256))
    run = Run(Setting(model, num_blocks=60, policy=policy, host_blocks=1000, watermark=watermark))
    prompts = [random_tokens(pick, 900) for _ in range(12)]
    reused(run, prompts)
    running = run.arrive(random_tokens(pick, 500), 90)
    while run.scheduler.requests[running].is_prefill_chunk or not run.scheduler.running:
        run.step()
    name = run.arrive(prompts[0], 4)
    output = run.scheduler.schedule()
    plan = attached_plan(output)
    assert plan is not None
    assert (plan.host is not None and bool(plan.host.loads)) == is_back
    assert (starts(output).get(name, 0) > 800) == is_back


def test_blocks_of_other_layers_would_not_come_back(model: Path) -> None:
    with pytest.raises(ValueError, match="KV offloading where layers of other kinds"):
        make_scheduler(Setting(model, with_full=True, host_blocks=100))


@pytest.mark.parametrize("num_blocks", [0.5, 3])
def test_host_memory_without_room_for_a_checkpoint_is_refused(
    model: Path, num_blocks: float
) -> None:
    policy = (("window", 124), ("checkpoint_interval", 256))
    with pytest.raises(ValueError, match=f"hold {int(num_blocks)} KV blocks, fewer than the 4"):
        make_scheduler(Setting(model, policy=policy, host_blocks=num_blocks))


@pytest.mark.parametrize("is_new", [False, True])
def test_what_a_step_is_to_fill_is_not_saved_before_it(model: Path, is_new: bool) -> None:
    """A copy of a block, or a block from host memory, may be given up in the step that gets it."""
    run = Run(Setting(model, num_blocks=200, host_blocks=1000))
    reused(run, [random_tokens(random.Random(0), 900)])
    blocks = {block.block_id for block in run.pool.blocks if block.block_hash is not None}
    assert run.pool.handed_out == set(), "every step has taken what it was to fill"
    run.pool.handed_out.update(blocks if is_new else ())
    run.pool.evict_blocks(blocks)
    transfers = run.scheduler._prefix_cache.take_transfers()
    assert (transfers is None) == is_new
