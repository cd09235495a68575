"""The tables of a prefill step on the device, as the kernels read them."""

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from vllm_sepllm.kernels.arguments import KeyLists
from vllm_sepllm.policy.keys.tiles import PrefillTiles


@dataclass(frozen=True, slots=True)
class PrefillMetadata:
    """:class:`vllm_sepllm.policy.keys.tiles.PrefillTiles` on the device, and numbers of the host.

    Attributes:
        tiles: [num_tiles, columns of TILE] int32; rows of zeros are skipped, so a persistent
            buffer may be padded.
        requests: [num_requests, columns of REQUEST] int32.
        separators: [num_separators] int32.
        until: [num_positions] int32.
        tile_tokens: tokens of a full tile.
        bound: of the separators, the engine's; a and n of each request are in its row.
        num_keys: keys in the lists of all requests.
        longest_list: keys in the longest of them.
        keys: the lists, from :func:`vllm_sepllm.ops.list_keys`; None: not listed yet.
    """

    tiles: torch.Tensor
    requests: torch.Tensor
    separators: torch.Tensor
    until: torch.Tensor
    tile_tokens: int
    bound: int
    num_keys: int
    longest_list: int
    keys: KeyLists | None = None

    @classmethod
    def from_packed(cls, tables: PrefillTiles, packed: torch.Tensor) -> "PrefillMetadata":
        """Name the parts of ``packed``, the caller's device copy of ``tables.packed`` (or longer).

        Raises:
            ValueError: if ``packed`` is not int32 or too short.
        """
        if packed.dtype != torch.int32 or packed.dim() != 1 or packed.numel() < tables.packed.size:
            raise ValueError(
                f"packed must be int32 [{tables.packed.size}] or longer, got {packed.dtype} "
                f"{tuple(packed.shape)}"
            )
        offsets, num_keys = tables.offsets, tables.requests["num_keys"]
        parts: dict[str, Any] = {
            name: _part(packed[offsets[name] :], table) for name, table in tables.tables.items()
        }
        return cls(
            **parts,
            tile_tokens=tables.tile_tokens,
            bound=tables.bound,
            num_keys=int(num_keys.sum()),
            longest_list=int(num_keys.max(initial=0)),
        )

    @classmethod
    def on(cls, device: torch.device | str, tables: PrefillTiles) -> "PrefillMetadata":
        """Copy the tables to a device; for callers without a persistent buffer."""
        return cls.from_packed(tables, torch.from_numpy(tables.packed).to(device))


def _part(words: torch.Tensor, table: NDArray[Any]) -> torch.Tensor:
    """The first of ``words`` in the shape of ``table``, its columns as a second dimension."""
    word = words.element_size()
    shape = table.shape if table.dtype.names is None else (len(table), table.itemsize // word)
    return words[: table.nbytes // word].view(shape)
