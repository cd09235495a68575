"""Prefill attention of one query tile on the CPU, under a mask."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_sepllm.policy.keys.masked_tiles import QueryTile


@dataclass(frozen=True, slots=True)
class TileTensors:
    """A query tile (policy/keys/masked_tiles.py) as tensors.

    Attributes:
        first: first query, counted from the start of the chunk.
        last: end of the queries, exclusive.
        keys: [num_keys] int64, key numbers; those that every query reads come first.
        bias: [last - first, num_partial], 0 or -inf in the dtype of the queries, for the last keys.
    """

    first: int
    last: int
    keys: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, tile: QueryTile, dtype: torch.dtype) -> "TileTensors":
        """Of a planned tile, for queries of ``dtype``."""
        bias = torch.zeros(tile.hidden.shape, dtype=dtype)
        bias.masked_fill_(torch.from_numpy(tile.hidden), float("-inf"))
        return cls(tile.first, tile.last, torch.from_numpy(tile.keys), bias)

    def mask(self) -> torch.Tensor | None:
        """[last - first, num_keys] to add to scores; None: nothing is hidden.

        Made when the tile attends: the masks of all tiles would take as much memory as the whole
        chunk's scores of a head.
        """
        num_partial = self.bias.shape[1]
        if num_partial == 0:
            return None
        return F.pad(self.bias, (len(self.keys) - num_partial, 0))


@dataclass(frozen=True, slots=True)
class TileAttention:
    """Softmax attention with what some models add to it.

    Attributes:
        scale: factor on query times key.
        softcap: bound c of c * tanh(score / c); 0: none.
        sinks: [num_heads], score of an extra key without a value per head; None: none.
    """

    scale: float
    softcap: float
    sinks: torch.Tensor | None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [num_queries, num_heads, head_size].
            key: [num_kv_heads, num_keys, head_size].
            value: [num_kv_heads, num_keys, head_size].
            bias: [num_queries, num_keys], 0 or -inf; None: every query reads every key.

        Returns:
            [num_queries, num_heads, head_size].
        """
        num_queries, num_heads, head_size = query.shape
        num_kv_heads = key.shape[0]
        group = num_heads // num_kv_heads
        # KV heads as the batch, the query heads that share one as its heads: K and V are not copied
        grouped = query.view(num_queries, num_kv_heads, group, head_size).permute(1, 2, 0, 3)
        key = key[:, None].expand(-1, group, -1, -1)
        value = value[:, None].expand(-1, group, -1, -1)
        if self.softcap == 0 and self.sinks is None:
            out = F.scaled_dot_product_attention(
                grouped, key, value, attn_mask=bias, scale=self.scale
            )
        else:
            out = self._explicit(grouped, key, value, bias)
        return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_size)

    def _explicit(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        scores = (query.float() @ key.float().transpose(-1, -2)) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if bias is not None:
            scores = scores + bias.float()
        if self.sinks is not None:
            sinks = self.sinks.float().view(scores.shape[0], scores.shape[1], 1, 1)
            scores = torch.cat([scores, sinks.expand(-1, -1, scores.shape[2], 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., : key.shape[2]]
        return (weights @ value.float()).to(query.dtype)
