"""The scheduler's half of the NixlConnector: compact blocks go from one instance to another."""

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import BlockIds
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
    NixlPullConnectorScheduler,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from vllm_sepllm.integration.scheduler.live_requests import Loading, live_of
from vllm_sepllm.integration.scheduler.transfer import StateDescriptions
from vllm_sepllm.integration.wire import transfer


class SepLLMNixlScheduler(NixlPullConnectorScheduler):
    """Leaves the last token of each prompt to the decode instance, and says what a state is."""

    def __init__(
        self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._descriptions = StateDescriptions(vllm_config)

    def _prefill_backoff(self) -> int:
        """Tokens at the end of a prompt that the prefill instance does not compute.

        One, as for Mamba's states: computing the last token again would spill it in place of the
        separator that has left the window.
        """
        return max(1, super()._prefill_backoff())

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """See the base class; nothing of a state that does not fit."""
        if not live_of(request).reads_state:
            return 0, False
        found: tuple[int, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return found

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """See the base class; remembers what is about to be read, which is counted once it is here.

        NixlPullConnectorScheduler._reqs_need_recv has the blocks until the step's metadata is made;
        to be dropped when vLLM counts bytes by request.
        """
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        read = self._reqs_need_recv.get(request.request_id)
        if num_external_tokens and read is not None:
            num_blocks = [len(group) for group in read[1]]
            live_of(request).holding.loading = Loading(num_external_tokens, num_blocks)

    def request_finished(
        self, request: Request, block_ids: BlockIds
    ) -> tuple[bool, dict[str, Any] | None]:
        """See the base class; what is held for another instance is described to it."""
        is_held, params = super().request_finished(request, block_ids)
        if is_held and params is not None:
            num_tokens = request.num_computed_tokens
            params[transfer.KEY] = self._descriptions.of(live_of(request), num_tokens)
        return is_held, params
