"""States of requests on their way from a prefill to a decode instance.

A state is the compact cache after all tokens of the prompt but the last: a query overwrites the
entry that leaves its window, so the last token, which the decode instance computes for its logits,
must not be in the cache before. The blocks are a function of token ids and settings alone.
"""

import hashlib
from typing import Any

import numpy as np
from vllm.config import VllmConfig

from vllm_sepllm.integration.scheduler.live_requests import LiveRequest
from vllm_sepllm.integration.wire import transfer
from vllm_sepllm.integration.wire.config import read_config


class StateDescriptions:
    """What the instance that reads a state compares before."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._vllm_config = vllm_config
        self._config = read_config(vllm_config)

    def of(self, live: LiveRequest, num_tokens: int) -> dict[str, Any]:
        """The request's state after ``num_tokens`` tokens, as JSON values."""
        tokens = np.array(live.request._all_token_ids[:num_tokens], dtype=np.int64)
        return {
            **transfer.settings(self._vllm_config, self._config, live.policy),
            "num_tokens": num_tokens,
            "tokens": hashlib.sha256(tokens.tobytes()).hexdigest()[:12],
        }

    def mismatch(self, live: LiveRequest) -> str | None:
        """Why an arriving request cannot start from the state that it names; None: it can."""
        given = live.request.kv_transfer_params or {}
        transfers = self._vllm_config.kv_transfer_config
        if transfers is not None and not transfers.is_kv_consumer:
            # vLLM keeps blocks from a step in flight where the role says that states arrive
            return f"kv_role is {transfers.kv_role} here, which reads no states"
        if live.request.resumable:
            return "a session of streaming input is computed where it runs"
        theirs = given.get(transfer.KEY)
        if not isinstance(theirs, dict):
            return "the instance that has it does not say that it serves with sepllm"
        ours = self.of(live, max(1, live.request.num_prompt_tokens - 1))
        differences = [
            f"{name} is {ours[name]} here and {theirs.get(name)} there"
            for name in ours
            if ours[name] != theirs.get(name)
        ]
        return ", ".join(differences) or None
