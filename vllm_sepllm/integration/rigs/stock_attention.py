"""vLLM's own Triton attention over a paged cache, for benchmarks to compare with."""

from typing import Any

import torch
from vllm.v1.attention.ops.triton_unified_attention import unified_attention

from vllm_sepllm.ops import PagedCache

# as vllm/v1/attention/backends/triton_attn.py launches it
_SEGMENTS = 16
_MIN_GRID = 128


class StockTriton:
    """Attention of a batch in which every request has as many query tokens and as many keys.

    Args:
        query: [num_requests * num_tokens, num_heads, head_size].
        num_keys: keys of each request, the query tokens' own included.
        cache: that holds them.
        block_table: [num_requests, max_blocks] int32.
    """

    def __init__(
        self, query: torch.Tensor, num_keys: int, cache: PagedCache, block_table: torch.Tensor
    ) -> None:
        (num_heads, size), num_requests = query.shape[1:], len(block_table)
        num_tokens, device = query.shape[0] // num_requests, query.device
        int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self._arguments: dict[str, Any] = {
            "q": query,
            # [num_blocks, block_size, num_kv_heads, head_size] in vLLM
            "k": cache.key.transpose(1, 2),
            "v": cache.value.transpose(1, 2),
            "cu_seqlens_q": torch.arange(num_requests + 1, **int32) * num_tokens,
            "max_seqlen_q": num_tokens,
            "seqused_k": torch.full((num_requests,), num_keys, **int32),
            "max_seqlen_k": num_keys,
            "softmax_scale": size**-0.5,
            "causal": True,
            "window_size": (-1, -1),
            "block_table": block_table,
            "softcap": 0,
            "q_descale": None,
            "k_descale": None,
            "v_descale": None,
        }
        threshold = _MIN_GRID // cache.key.shape[1]
        if num_tokens == 1 and num_requests <= threshold:
            parts = (threshold, num_heads, _SEGMENTS)
            self._arguments |= {
                "seq_threshold_3D": threshold,
                "num_par_softmax_segments": _SEGMENTS,
                "softmax_segm_output": torch.empty((*parts, size), device=device),
                "softmax_segm_max": torch.empty(parts, device=device),
                "softmax_segm_expsum": torch.empty(parts, device=device),
            }

    def run(self, out: torch.Tensor) -> None:
        """``out`` is like the query."""
        unified_attention(out=out, **self._arguments)
