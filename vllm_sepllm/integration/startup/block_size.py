"""The size of a KV block where nobody names one."""

from vllm.config import CacheConfig
from vllm.platforms import current_platform

# The default of vLLM's CPU platform is 128, in which a compact cache wastes 64 entries on average.
# 32 is the smallest size for its kernels.
CPU_BLOCK_SIZE = 32


def platform_block_size() -> tuple[str, int]:
    """This platform's name and the tokens of a block with which sepllm runs on it."""
    if current_platform.is_cpu():
        return current_platform.device_name, CPU_BLOCK_SIZE
    return current_platform.device_name, CacheConfig.DEFAULT_BLOCK_SIZE
