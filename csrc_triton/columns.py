"""The columns of policy/keys/columns.py for kernels: ``tl.load(tile_ptr + TILE.position)``."""

from types import SimpleNamespace

import triton.language as tl

from vllm_sepllm.policy.keys import columns


class Columns(tl.constexpr):  # type: ignore[misc]  # triton has no types
    """A constant that has the number of each column of a table as an attribute.

    Triton's hash of a kernel, by which it finds compiled ones, covers the constants that the kernel
    names: after a change of the table it compiles anew.
    """

    def __init__(self, numbers: dict[str, int]) -> None:
        # compiled kernels read the attributes of a constant's value, interpreted ones its own
        super().__init__(SimpleNamespace(**numbers))
        self.__dict__.update(numbers)


RUNS = Columns(columns.numbers(columns.RUNS))
TILE = Columns(columns.numbers(columns.TILE))
REQUEST = Columns(columns.numbers(columns.REQUEST))
