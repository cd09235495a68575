"""Runs on a GPU if there is one, else in Triton's interpreter (see conftest.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sepllm import ops
from vllm_sepllm.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(deadline=None, max_examples=25)
@given(
    num_entries=st.sampled_from([0, 1, 63, 256, 300]),
    block_size=st.sampled_from([1, 16, 24]),
    num_rows=st.integers(1, 4),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_slots_are_those_of_the_block_table(
    num_entries: int, block_size: int, num_rows: int, padding: int, seed: int
) -> None:
    """Rows of a wider buffer, block ids whose slots pass 2**31, entries that do not exist."""
    gen = torch.Generator().manual_seed(seed)
    width = 5
    table = torch.randint(2**28, (num_rows, width + padding), generator=gen, dtype=torch.int32)
    rows = torch.randint(num_rows, (num_entries,), generator=gen)
    compact = torch.randint(-1, width * block_size, (num_entries,), generator=gen)
    entries = torch.stack([rows, compact])
    wanted, got = torch.full((2, num_entries), -7, device=DEVICE)
    entries, table = entries.to(DEVICE), table.to(DEVICE)[:, :width]
    reference.entry_slots(entries, table, block_size, wanted)
    ops.entry_slots(entries, table, block_size, got)
    assert torch.equal(wanted.cpu(), got.cpu())


@pytest.mark.parametrize(
    ("entries", "table", "out", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1), "entries must"),
        (
            torch.zeros(2, 1, dtype=torch.int64),
            torch.zeros(1, 1, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            "block_table must be int32",
        ),
        (
            torch.zeros(2, 1, dtype=torch.int64),
            torch.zeros(1, 1, dtype=torch.int32),
            torch.zeros(2, dtype=torch.int64),
            r"out must be int64 \[1\]",
        ),
    ],
)
def test_wrong_arguments_are_named(
    entries: torch.Tensor, table: torch.Tensor, out: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ops.entry_slots(entries, table, 16, out)
