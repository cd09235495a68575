"""KV caches in fp8, by the names of vLLM: which of them the prefill kernel dequantises."""

from vllm.platforms import current_platform

# one scale a tensor and the platform's own fp8 format
FP8_CACHE_DTYPES = ("fp8", "fp8_e4m3")
# the first compute capability whose hardware converts vLLM's format: Triton compiles for no other
_NEEDED = 89


def reads_fp8(kv_cache_dtype: str) -> bool:
    """Whether layers with a cache of that kind can be SepLLM layers on this platform."""
    return kv_cache_dtype in FP8_CACHE_DTYPES and not current_platform.is_cpu() and converts_fp8()


def converts_fp8() -> bool:
    """Whether Triton knows vLLM's fp8 format on this device; ROCm has one of its own."""
    return not current_platform.is_cuda() or current_platform.has_device_capability(_NEEDED)
