"""Memory of a step that vLLM's profile does not see, because attention does not run in it."""

from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_sepllm.policy.layout import max_compact_length
from vllm_sepllm.policy.visibility import Policy

# place and until of a key (ops.list_keys); position and until of a separator (plan_tiles): int32
_BYTES_PER_KEY = 4 * 4
# share of device memory that is held at most, because the KV cache loses it: only steps with
# hundreds of chunks behind one long shared prefix need more
_MOST_OF_DEVICE = 0.01


def key_list_bytes(vllm_config: VllmConfig, policy: Policy, device_bytes: int) -> int:
    """Bytes of the key lists of a step whose every request is a prefill chunk."""
    scheduler = vllm_config.scheduler_config
    num_tokens = scheduler.max_num_batched_tokens
    num_chunks = min(scheduler.max_num_seqs, num_tokens)
    longest = max_compact_length(policy, vllm_config.model_config.max_model_len)
    # a chunk's own separators may stand among the far keys once more
    wanted = (num_chunks * longest + 2 * num_tokens) * _BYTES_PER_KEY
    return min(wanted, int(device_bytes * _MOST_OF_DEVICE))


def hold_while_profiling(runner: Any, num_bytes: int, device: torch.device) -> None:
    """Let vLLM's peak of a step include memory that is held beside its forward."""
    profile_run = runner.profile_run

    def profile_run_beside(*args: Any, **kwargs: Any) -> Any:
        held = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        result = profile_run(*args, **kwargs)
        del held
        return result

    runner.profile_run = profile_run_beside
