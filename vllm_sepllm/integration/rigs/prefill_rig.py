"""One layer's prefill of a prompt on the CPU, without an engine, for benchmarks."""

from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform

from vllm_sepllm.integration.worker.cpu.kv_layout import split_cache
from vllm_sepllm.integration.worker.cpu.sequences import ChunkSequences, SequenceKernel
from vllm_sepllm.policy.keys.sequences import sequence_tile, tile_sequences
from vllm_sepllm.policy.step.prefill import Chunk
from vllm_sepllm.policy.visibility import BoolArray, Policy

_BLOCK = 128  # vLLM's default on CPUs


def kernel_isa() -> str:
    """The name of vLLM's kernel for 16-bit layers on this machine."""
    current_platform.import_kernels()
    has_amx = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    return "amx" if has_amx else "vec"


class PrefillRig:
    """A whole prompt in one chunk: stock vLLM's attention of it, and sepllm's.

    Args:
        heads: query heads, KV heads and elements a head.
        is_separator: [num_tokens], whether each token of the prompt is a separator.
        policy: a and n; s must hold all separators.
        most: queries a tile.

    Raises:
        ValueError: if vLLM's kernel cannot serve such heads or such a window.
    """

    def __init__(
        self, heads: tuple[int, int, int], is_separator: BoolArray, policy: Policy, most: int
    ) -> None:
        num_heads, num_kv_heads, size = heads
        num_tokens, isa = len(is_separator), kernel_isa()
        self.query = torch.randn(num_tokens, num_heads, size).bfloat16()
        self.key = torch.randn(num_tokens, num_kv_heads, size).bfloat16()
        self.value = torch.randn(num_tokens, num_kv_heads, size).bfloat16()
        self._scale = size**-0.5
        separators = np.flatnonzero(is_separator)
        separators = separators[separators >= policy.initial_tokens]
        chunk = Chunk(policy, 0, num_tokens, 0, separators)
        kernel = SequenceKernel.of(num_heads, num_kv_heads, size, isa, torch.bfloat16)
        tile = sequence_tile(chunk, most, kernel.block_size) if kernel else 0
        if kernel is None or tile == 0:
            raise ValueError(
                f"vLLM's kernel {isa!r} does not prefill heads of {size} in a window of "
                f"{policy.window}; sepllm masks tiles there"
            )
        self.sequences: ChunkSequences = kernel.plan(tile_sequences(chunk, tile, kernel.block_size))
        self._stock = self._stock_arguments(isa)

    def _stock_arguments(self, isa: str) -> dict[str, Any]:
        """Arguments as CPUAttentionBackendImpl passes them; the keys are in the cache."""
        num_tokens, num_kv_heads, size = self.key.shape
        num_blocks = -(-num_tokens // _BLOCK)
        cache = split_cache(
            torch.zeros(num_blocks, num_kv_heads, _BLOCK, 2 * size, dtype=torch.bfloat16)
        )
        slots = torch.arange(num_tokens)
        vllm_ops.cpu_attn_reshape_and_cache(self.key, self.value, *cache, slots, isa)
        lengths = torch.tensor([num_tokens], dtype=torch.int32)
        starts = torch.tensor([0, num_tokens], dtype=torch.int32)
        metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=self.query.shape[1],
            num_kv_heads=num_kv_heads,
            head_dim=size,
            seq_lens=lengths,
            dtype=torch.bfloat16,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        return {
            "query": self.query,
            "key_cache": cache[0],
            "value_cache": cache[1],
            "query_start_loc": starts,
            "seq_lens": lengths,
            "scale": self._scale,
            "causal": True,
            "alibi_slopes": None,
            "sliding_window": -1,
            "block_table": torch.arange(num_blocks, dtype=torch.int32)[None],
            "softcap": 0.0,
            "scheduler_metadata": metadata,
            "s_aux": None,
        }

    def stock(self, out: torch.Tensor) -> None:
        """Full attention; ``out`` is like the query."""
        vllm_ops.cpu_attention_with_kv_cache(output=out, **self._stock)

    def sepllm(self, out: torch.Tensor) -> None:
        """SepLLM's, the copies into the scratch cache included."""
        self.sequences.attend(self.query, self.key, self.value, None, self._scale, None, out)

    def fill(self, out: torch.Tensor) -> None:
        """The copies into the scratch cache alone; ``out`` is not written."""
        self.sequences.fill(self.key, self.value, None, self._scale)
