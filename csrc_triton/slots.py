"""Slots of compact entries, looked up in the device's block table. Oracle: ops.reference.

The block table of a GPU worker lives on the device alone, so a step's slots are computed there.
"""

import torch
import triton
import triton.language as tl

# one load each of row, entry and block id a thread and step; larger blocks only idle threads
_BLOCK = 256


# the number of entries differs step by step: no variant of it may be compiled while serving
@triton.jit(do_not_specialize=["num_entries"])
def slots_kernel(
    entries_ptr,  # [2, num_entries] int64: row of the block table, compact index; negative: none
    block_table_ptr,  # [num_rows, max_blocks] int32
    out_ptr,  # [num_entries] int64
    num_entries,
    stride_table,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < num_entries
    row = tl.load(entries_ptr + entry, mask=inside, other=0)
    compact = tl.load(entries_ptr + num_entries + entry, mask=inside, other=-1)
    exists = compact >= 0
    block_ptr = block_table_ptr + row * stride_table + compact // BLOCK_SIZE
    block = tl.load(block_ptr, mask=exists, other=0).to(tl.int64)
    slot = tl.where(exists, block * BLOCK_SIZE + compact % BLOCK_SIZE, -1)
    tl.store(out_ptr + entry, slot, mask=inside)


def launch(
    entries: torch.Tensor, block_table: torch.Tensor, block_size: int, out: torch.Tensor
) -> None:
    """Arguments as in :func:`vllm_sepllm.ops.entry_slots`, already checked."""
    num_entries = entries.shape[1]
    if num_entries == 0:  # a grid of zero programs is an error
        return
    slots_kernel[(triton.cdiv(num_entries, _BLOCK),)](
        entries, block_table, out, num_entries, block_table.stride(0),
        BLOCK_SIZE=block_size, BLOCK=_BLOCK,
    )  # fmt: skip
