"""Prefill attention of one query tile on the CPU."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


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
