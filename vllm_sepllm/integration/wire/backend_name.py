"""The name ``sepllm`` in vLLM's list of attention backends, in every process and pickle."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

BACKEND_NAME = "SEPLLM"
# GPU backends that we wrap: their caches are rows [num_blocks, num_kv_heads, block_size,
# 2 * head_size] in any order of strides, which our kernels read. ROCM_ATTN cuts keys into vectors,
# ROCM_AITER_FA may shuffle.
WRAPPED_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
_BACKEND_PATH = "vllm_sepllm.integration.startup.unselected_backend.SepLLMBackend"


def register_backend_name() -> "AttentionBackendEnum":
    """Make ``--attention-backend sepllm`` parse; return the enum member. May run again.

    vLLM: ``register_backend`` adds a member at run time. A process that unpickles it before its
    plugins are loaded does not know it ("... is not a valid AttentionBackendEnum"), so the member
    pickles as a call of this function.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, _BACKEND_PATH)
        member = AttentionBackendEnum[BACKEND_NAME]
        setattr(member, "__reduce_ex__", lambda protocol: (register_backend_name, ()))  # noqa: B010
    return AttentionBackendEnum[BACKEND_NAME]
