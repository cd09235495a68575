"""The worker's half of the NixlConnector: its handshake tells how an instance serves."""

import json
from dataclasses import replace

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from vllm_sepllm.integration.wire import transfer
from vllm_sepllm.integration.wire.config import read_config


class SepLLMNixlWorker(NixlPullConnectorWorker):
    """Moves blocks as vLLM's does, whatever is in them."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See the base class; instances that do not serve alike refuse each other's handshake.

        vLLM compares a hash of the model and of its attention backend, which ours wraps. What else
        must be equal is added readably, because vLLM's refusal shows both.
        """
        super().register_kv_caches(kv_caches)
        config = read_config(self.vllm_config)
        ours = transfer.settings(self.vllm_config, config, config.policy)
        self.compat_hash = f"{self.compat_hash} with sepllm {json.dumps(ours)}"
        assert self.xfer_handshake_metadata is not None, "registering makes it"
        self.xfer_handshake_metadata = replace(
            self.xfer_handshake_metadata, compatibility_hash=self.compat_hash
        )
