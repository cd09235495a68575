"""vLLM's NixlConnector, moving compact caches between a prefill and a decode instance.

vLLM makes a connector in the scheduler and one in each worker; ours differ from its own where it
takes the blocks of a request for those of its token positions.
"""

from pkgutil import resolve_name

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import (
    NixlBaseConnector,
    NixlPullConnector,
)
from vllm.v1.kv_cache_interface import KVCacheConfig

_SCHEDULER = "vllm_sepllm.integration.scheduler.nixl:SepLLMNixlScheduler"
_WORKER = "vllm_sepllm.integration.worker.nixl:SepLLMNixlWorker"


class NixlConnector(NixlPullConnector):
    """Has vLLM's name, by which vLLM finds it in the module and looks for it in configurations."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        # not NixlPullConnector's, which makes vLLM's own halves
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        half = _SCHEDULER if role == KVConnectorRole.SCHEDULER else _WORKER
        made = resolve_name(half)(vllm_config, self.engine_id, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = made
        else:
            self.connector_worker = made
