"""Host memory for evicted checkpoints (``--kv-offloading-size``), as every process sees it."""

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

_KEY = "sepllm_host_bytes"


def write_host_bytes(vllm_config: VllmConfig, num_bytes: int) -> None:
    """Reserve host memory, of all workers together.

    Not in vLLM's own setting: from that it would make a connector, in every copy of the config.
    """
    given = vllm_config.additional_config
    assert isinstance(given, dict), "refusals.check_engine_args lets only a dict pass"
    vllm_config.additional_config = {**given, _KEY: num_bytes}


def num_host_slots(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int | None:
    """Blocks that host memory has room for, the same number in every process; None: it is off."""
    given = vllm_config.additional_config
    assert isinstance(given, dict), "refusals.check_engine_args lets only a dict pass"
    num_bytes: int = given.get(_KEY, 0)
    if not num_bytes:
        return None
    return num_bytes // block_bytes(vllm_config, kv_cache_config)


def block_bytes(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Bytes of a block of the pool, of all workers together."""
    # vLLM allocates once, and each KVCacheTensor is a place in it
    (size,) = {tensor.size for tensor in kv_cache_config.kv_cache_tensors}
    block = size // kv_cache_config.num_blocks
    return block * vllm_config.parallel_config.tensor_parallel_size
