"""Runs on a GPU if there is one, else in Triton's interpreter (see conftest.py).

Tolerance: err(kernel) <= 2 * err(torch in the same dtype) + atol, both against float64.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.support.kernel_cases import DEVICE, Case, Shape, make_case, prompt, random_prompt
from vllm_sepllm import ops
from vllm_sepllm.policy.visibility import BatchPolicy, Policy

ATOL = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}


def check(case: Case, **options) -> None:
    oracle = case.dense(torch.float64, **options)
    out = case.run(**options).cpu().double()
    assert not out.isnan().any()
    same_dtype = case.dense(case.query.dtype, **options).double()
    allowed = 2 * (same_dtype - oracle).abs().max() + ATOL[case.query.dtype]
    assert (out - oracle).abs().max() <= allowed


# shrinking would run the interpreter for minutes
@settings(deadline=None, max_examples=12, phases=set(Phase) - {Phase.shrink, Phase.explain})
@given(
    policy=st.builds(
        Policy,
        initial_tokens=st.sampled_from([0, 3, 4]),
        window=st.sampled_from([1, 6, 20, 200]),
        max_separators=st.sampled_from([None, 0, 1, 5]),
    ),
    shape=st.builds(
        Shape,
        num_kv_heads=st.integers(1, 2),
        group=st.sampled_from([1, 3, 8]),
        block_size=st.sampled_from([1, 4, 16]),
        layout=st.sampled_from(["bhtd", "bthd", "bhdt"]),
        tile_tokens=st.sampled_from([3, 7, 8]),
    ),
    second_initial=st.sampled_from([0, 3, 4, 300]),
    second_window=st.sampled_from([1, 6, 20, 200]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_matches_the_rule_on_random_layouts(
    policy, shape, second_initial, second_window, density, seed
) -> None:
    initial = np.array([policy.initial_tokens, second_initial])
    windows = np.array([policy.window, second_window])
    policy = BatchPolicy(initial, windows, policy.max_separators)
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, 2)
    prompts = [random_prompt(rng, n, int(rng.integers(0, n)), density) for n in lengths]
    check(make_case(policy, prompts, shape, seed))


@pytest.mark.parametrize("max_separators", [None, 0, 2, 7])
@pytest.mark.parametrize(("length", "start"), [(1, 0), (64, 63), (100, 37), (100, 2), (163, 100)])
def test_odd_sizes(length, start, max_separators) -> None:
    """A first token, a lone last one, odd chunks, one that begins inside the initial tokens."""
    policy = Policy(initial_tokens=4, window=24, max_separators=max_separators)
    check(make_case(policy, [prompt(length, start)], Shape(tile_tokens=16)))


@pytest.mark.parametrize("max_separators", [None, 400, 300, 100])
def test_many_separators_seen_by_whole_tiles(max_separators) -> None:
    """Blocks without a mask, in the cache and in the chunk, until separators have to make place.

    About 160 of 350 separators are cached; of 300 that may stay the chunk has more at its end.
    """
    policy = Policy(initial_tokens=4, window=24, max_separators=max_separators)
    cached, fresh = prompt(720, 340, 0.5), prompt(400, 0, 0.5)
    check(make_case(policy, [cached, fresh], Shape(group=4, tile_tokens=16)))


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_head_sizes_and_dtypes(head_size, dtype) -> None:
    shape = Shape(head_size=head_size, dtype=dtype, tile_tokens=32)
    check(make_case(Policy(3, 16), [prompt(70, 40)], shape))


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_cache(cache_dtype) -> None:
    shape = Shape(dtype=torch.bfloat16, cache_dtype=cache_dtype, head_size=32)
    check(make_case(Policy(4, 12), [prompt(70, 40), prompt(20, 5)], shape))


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("use_sinks", [False, True])
def test_soft_cap_and_sinks(soft_cap, use_sinks) -> None:
    case = make_case(Policy(3, 9, 4), [prompt(60, 30), prompt(11, 0)], Shape(group=4))
    sinks = torch.linspace(-2, 3, 4) if use_sinks else None
    oracle = case.dense(torch.float64, soft_cap=soft_cap, sinks=sinks)
    device_sinks = None if sinks is None else sinks.to(DEVICE)
    out = case.run(soft_cap=soft_cap, sinks=device_sinks).cpu()
    assert (out - oracle).abs().max() <= 5e-6


@pytest.mark.parametrize("group", range(1, 9))
def test_every_group_size(group) -> None:
    check(make_case(Policy(2, 10), [prompt(50, 20)], Shape(num_kv_heads=2, group=group)))


def test_empty_chunks_and_padded_tiles_are_skipped() -> None:
    """Rows outside the chunks keep what they held; so persistent buffers may be padded."""
    case = make_case(Policy(3, 8), [prompt(20, 20), prompt(40, 17), prompt(5, 5)], Shape())
    meta = case.metadata
    padded = replace(meta, tiles=torch.cat([meta.tiles, torch.zeros_like(meta.tiles)]))
    assert torch.equal(replace(case, metadata=padded).run(), case.run())
    nothing = replace(case, metadata=replace(meta, tiles=meta.tiles[:0]))
    assert nothing.run().isnan().all()


def test_result_does_not_depend_on_the_chunk_size() -> None:
    flags, _ = prompt(90, 0)
    policy = Policy(4, 16, 6)
    whole = make_case(policy, [(flags, 0)], Shape()).run()
    for start in (1, 16, 33, 89):
        case = make_case(policy, [(flags, start)], Shape())
        full = make_case(policy, [(flags, 0)], Shape())
        case = replace(case, query=full.query[start:])
        assert (case.run() - whole[start:]).abs().max() <= 2e-6


def test_requests_with_windows_of_their_own() -> None:
    """Smaller and larger than the chunk, one that has not begun to wrap, one beyond the request."""
    policy = BatchPolicy(np.full(4, 3), np.array([5, 24, 60, 4096]), 6)
    prompts = [prompt(60, 25), prompt(70, 50), prompt(64, 62), prompt(50, 7)]
    case = make_case(policy, prompts, Shape())
    check(case)
    assert (case.run_reference() - case.run()).abs().max() <= 2e-6


@pytest.mark.parametrize("max_separators", [None, 6])
def test_requests_with_initial_tokens_of_their_own(max_separators) -> None:
    """None, few, and so many that a chunk begins before, among and behind them."""
    initial_tokens, windows = [0, 3, 4, 300, 300, 300], [24, 5, 24, 24, 5, 24]
    policy = BatchPolicy(np.array(initial_tokens), np.array(windows), max_separators)
    sizes = [(60, 25), (70, 50), (64, 62), (360, 310), (330, 290), (40, 10)]
    case = make_case(policy, [prompt(*size) for size in sizes], Shape())
    check(case)
    assert (case.run_reference() - case.run()).abs().max() <= 2e-6


def test_matches_the_reference_implementation() -> None:
    case = make_case(Policy(4, 12, 5), [prompt(60, 25), prompt(33, 30)], Shape(group=3))
    assert (case.run() - case.run_reference()).abs().max() <= 2e-6


def test_activations_may_be_parts_of_wider_rows() -> None:
    """As vLLM passes them: query, key and value are slices of one projection."""
    case = make_case(Policy(4, 12), [prompt(60, 25)], Shape(group=2))
    joined = torch.cat([case.query.flatten(1), case.key.flatten(1), case.value.flatten(1)], dim=1)
    parts = [part.unflatten(1, (-1, 16)) for part in joined.split([32, 16, 16], dim=1)]
    split = replace(case, query=parts[0], key=parts[1], value=parts[2])
    assert split.query.stride(0) == 64
    assert torch.equal(split.run(), case.run())


def test_errors_name_the_argument_and_the_value() -> None:
    case = make_case(Policy(4, 12), [prompt(20, 10)], Shape())
    uint8 = case.cache.key.to(torch.uint8)
    with pytest.raises(ValueError, match=r"cache.key must be torch.float32 or fp8, got torch.uint"):
        replace(case, cache=replace(case.cache, key=uint8, value=uint8)).run()
    scales = (torch.ones(1, device=DEVICE),) * 2
    with pytest.raises(ValueError, match="scales must be given for an fp8 cache and no other"):
        replace(case, cache=replace(case.cache, scales=scales)).run()
    with pytest.raises(ValueError, match="soft_cap must be >= 0"):
        case.run(soft_cap=-1.0)
    with pytest.raises(ValueError, match="scale must be > 0"):
        case.run(scale=-1.0)
    most = ops.prefill_tile_tokens(2, 1, 16, torch.float32)
    wide = replace(case, metadata=replace(case.metadata, tile_tokens=most + 1))
    with pytest.raises(ValueError, match=f"tile_tokens must be <= {most} here, got {most + 1}"):
        wide.run()
    with pytest.raises(ValueError, match=r"query must be \[num_tokens, heads, head_size\]"):
        replace(case, query=case.query.expand(-1, -1, -1).transpose(0, 1)).run()
