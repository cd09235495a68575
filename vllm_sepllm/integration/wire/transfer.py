"""What two instances must have in common before one reads a state that the other has computed."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from vllm.config import VllmConfig

from vllm_sepllm.config import ResolvedConfig
from vllm_sepllm.policy.visibility import Policy

# of kv_transfer_params, which an instance answers with and a proxy hands on to the next one
KEY = "sepllm"


def settings(vllm_config: VllmConfig, config: ResolvedConfig, policy: Policy) -> dict[str, Any]:
    """Everything besides the tokens that decides which entry lies where, as JSON values.

    ``policy`` is a request's, or the engine's.
    """
    separators = json.dumps([type(config.separators).__name__, asdict(config.separators)])
    return {
        "initial_tokens": policy.initial_tokens,
        "window": policy.window,
        "max_separators": policy.max_separators,
        "separators": hashlib.sha256(separators.encode()).hexdigest()[:12],
        "max_position": policy.max_position,
        "full_layers": list(config.full_layers),
        "block_size": vllm_config.cache_config.block_size,
        "tensor_parallel_size": vllm_config.parallel_config.tensor_parallel_size,
    }
