"""Runs on a GPU if there is one, else in Triton's interpreter (see conftest.py)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kernel_cases import Shape, make_case, random_prompt
from vllm_sepllm import ops
from vllm_sepllm.ops import reference
from vllm_sepllm.policy.visibility import BatchPolicy


@settings(deadline=None, max_examples=40)
@given(
    initial_tokens=st.lists(st.sampled_from([0, 3, 4, 300]), min_size=3, max_size=3),
    windows=st.lists(st.sampled_from([1, 6, 20, 200]), min_size=3, max_size=3),
    max_separators=st.sampled_from([None, 0, 1, 5]),
    block_size=st.sampled_from([1, 4, 24]),
    tile_tokens=st.sampled_from([3, 8]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_lists_are_those_of_the_reference(
    initial_tokens, windows, max_separators, block_size, tile_tokens, density, seed
) -> None:
    """Requests with a and n of their own, empty chunks, chunks longer than a program's entries."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(0, 40, 2), 340]
    prompts = [random_prompt(rng, n, int(rng.integers(0, n + 1)), density) for n in lengths]
    policy = BatchPolicy(np.array(initial_tokens), np.array(windows), max_separators)
    shape = Shape(block_size=block_size, tile_tokens=tile_tokens)
    case = make_case(policy, prompts, shape, seed)
    table = case.block_table
    got, num_keys = case.metadata.keys, case.metadata.num_keys
    wanted = ops.KeyLists(*torch.empty(2, num_keys, dtype=torch.int32, device=table.device))
    reference.list_keys(case.metadata, table, block_size, wanted)
    assert torch.equal(got.place[:num_keys], wanted.place)
    assert torch.equal(got.until[:num_keys], wanted.until)


def test_keys_are_listed_before_they_are_read() -> None:
    case = make_case(BatchPolicy(np.array([4]), np.array([12])), [([True] * 20, 10)], Shape())
    with pytest.raises(ValueError, match=r"metadata.keys must be listed before the first layer"):
        replace(case, metadata=replace(case.metadata, keys=None)).run()


def test_errors_name_the_argument_and_the_value() -> None:
    case = make_case(BatchPolicy(np.array([4]), np.array([12])), [([True] * 20, 10)], Shape())
    with pytest.raises(ValueError, match=r"block_table must be int32 \[num_rows, max_blocks\]"):
        ops.list_keys(case.metadata, case.block_table.long(), 4)
