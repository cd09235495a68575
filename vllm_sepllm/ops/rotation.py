"""Keys that get another position: the rotation of RoPE by the difference, in torch.

R(new) k = R(new - old) R(old) k, so a key in the cache is turned without the activation that it was
made of (RoFormer, arXiv:2104.09864).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """Angles of a model's rotary embedding.

    Attributes:
        cos: [num_positions, rotary_dim / 2] float32, of the positions from 0.
        sin: like ``cos``.
        is_neox_style: pairs are the two halves of a head's rotated part, not its neighbours.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    is_neox_style: bool

    def turned(self, keys: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Keys at other positions.

        Args:
            keys: [num_keys, num_heads, head_size], of which the first rotary_dim elements turn.
            delta: [num_keys] int64, new position less old one; below num_positions either way.

        Returns:
            Like ``keys``; computed in float32 and rounded once.
        """
        distance = delta.abs()
        cos = self.cos[distance][:, None]  # [num_keys, 1, rotary_dim / 2]
        sin = (self.sin[distance] * delta.sign()[:, None])[:, None]
        size = 2 * cos.shape[2]
        part = keys[..., :size].float()
        if self.is_neox_style:
            one, other = part.chunk(2, dim=2)
        else:
            one, other = part[..., ::2], part[..., 1::2]
        pairs = (one * cos - other * sin, other * cos + one * sin)
        turned = torch.cat(pairs, 2) if self.is_neox_style else torch.stack(pairs, 3).flatten(2)
        return torch.cat([turned.to(keys.dtype), keys[..., size:]], dim=2)
