"""What an engine is made of and what is compiled for it, for checks that must know what ran."""

from typing import Any

import torch
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform


def parts_of(llm: Any) -> dict[str, str]:
    """Part of the engine -> its name: runner, CUDA graphs, and a layer's backend.

    The layer is missing where workers are processes of their own (tensor parallel).
    """
    # vllm.config.VllmConfig, as the engine changed it while it started
    vllm_config = llm.llm_engine.vllm_config
    graphs = vllm_config.compilation_config.cudagraph_mode
    found = {
        "worker": vllm_config.parallel_config.worker_cls.rpartition(".")[2],
        "runner": "V2" if vllm_config.use_v2_model_runner else "V1",
        "graphs": "NONE" if graphs is None else graphs.name,
    }
    # CompilationConfig.static_forward_context: attention layers of this process, by name
    for layer in vllm_config.compilation_config.static_forward_context.values():
        return found | {"backend": layer.attn_backend.__name__}
    return found


def rms_norm_error(dtype: torch.dtype = torch.bfloat16) -> float:
    """Largest difference between vLLM's compiled normalisation and torch's; importing loads it.

    Raises:
        RuntimeError, AttributeError: if the operation is missing or has no code for the device.
    """
    device = current_platform.device_type
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 512, generator=generator).to(device, dtype)
    out = torch.full_like(x, float("nan"))
    # vllm._custom_ops.rms_norm: torch.ops._C.rms_norm
    vllm_ops.rms_norm(out, x, torch.ones(512, device=device, dtype=dtype), 1e-5)
    wanted = torch.nn.functional.rms_norm(x.float(), (512,), eps=1e-5)
    return float((out.float() - wanted).abs().max())


def flash_attention_version() -> int | None:
    """Of the FlashAttention that vLLM would choose; None: it has none."""
    # vllm.v1.attention.backends.fa_utils asks the compiled library, which CPU builds lack
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    return get_flash_attn_version()
