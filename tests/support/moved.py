"""Names that tests take from vLLM, and that lie elsewhere since 0.33 (tried first)."""

import vllm.config.cache

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_groups, is_kv_cache_spec_uniform
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups, is_kv_cache_spec_uniform
try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

SINCE_0_33 = hasattr(vllm.config.cache, "KV_CACHE_DTYPES")

__all__ = ["SINCE_0_33", "get_kv_cache_groups", "is_kv_cache_spec_uniform", "make_arg_parser"]
