"""Coordinator of all KV cache groups of SepLLM layers: what happens once per request."""

from collections.abc import Sequence

from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, KVCacheCoordinator
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_sepllm.integration.log import logger
from vllm_sepllm.integration.scheduler.live_requests import Holding, LiveRequest, LiveRequests
from vllm_sepllm.integration.scheduler.manager import SepLLMManager
from vllm_sepllm.integration.scheduler.prefix_cache.cache import PrefixCache
from vllm_sepllm.integration.scheduler.shared_tails import SharedTails
from vllm_sepllm.integration.scheduler.usage import KvUsage
from vllm_sepllm.policy.visibility import Policy


class SepLLMCoordinator:
    """Answers the managers' questions, and tells prefix cache and metrics of their events.

    It stands beside vLLM's coordinator, which calls each manager on its own.
    """

    def __init__(
        self,
        coordinator: KVCacheCoordinator,
        requests: LiveRequests,
        checkpoint_interval: int,
        *,
        num_staging: int = 0,
        most_per_step: int = 1,
    ) -> None:
        """Take over the managers of all SepLLM groups.

        Args:
            coordinator: vLLM's, which has the managers.
            requests: the scheduler's.
            checkpoint_interval: tokens between regular checkpoints.
            num_staging: entries of each request beyond its compact length (policy/step/staging.py).
            most_per_step: tokens that a request can gain in a step.
        """
        every = coordinator.single_type_managers
        self.managers = [m for m in every if isinstance(m, SepLLMManager)]
        self.requests = requests
        self.num_staging = num_staging
        self._coordinator = coordinator
        are_alone = len(self.managers) == len(every)
        alignment = 1 if are_alone else coordinator.scheduler_block_size
        self.prefix_cache = PrefixCache(
            self.managers, requests.engine, checkpoint_interval, alignment
        )
        self.shared_tails = SharedTails(requests, most_per_step)
        self._usage: KvUsage | None = None
        interval = self.prefix_cache.interval_of(requests.engine)
        if self.prefix_cache.is_enabled and interval != checkpoint_interval:
            logger.warning(
                "sepllm leaves a checkpoint every %d tokens, not every %d: prefixes end where all "
                "kinds of layers have a block boundary.",
                interval,
                checkpoint_interval,
            )
        for manager in self.managers:
            manager.events = self
        if isinstance(coordinator, HybridKVCacheCoordinator):
            _answer_by_instance(coordinator)

    def watch(self, max_model_len: int) -> KvUsage:
        """Follow what requests and checkpoints hold from now on, for the metrics."""
        cache = self.prefix_cache
        self._usage = KvUsage(
            self.managers, self.requests, cache.registry.block_count, cache.host, max_model_len
        )
        return self._usage

    def most_blocks(self, policy: Policy, request: Request, num_tokens: int) -> int:
        """The most blocks of all groups that a new request holds with ``num_tokens`` tokens."""
        total = 0
        for manager in self._coordinator.single_type_managers:
            if isinstance(manager, SepLLMManager):
                total += manager.most_blocks(policy, num_tokens)
            else:
                total += manager.get_num_blocks_to_allocate(
                    request_id=request.request_id,
                    num_tokens=num_tokens,
                    new_computed_blocks=(),
                    total_computed_tokens=0,
                    num_local_computed_tokens=0,
                    num_tokens_main_model=num_tokens,
                    apply_admission_cap=True,
                )
        return total

    # ------------------------------------------------------------------ RequestEvents

    def find(
        self, live: LiveRequest, max_length: int, group_ids: Sequence[int]
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """See RequestEvents."""
        return self.prefix_cache.find(live, max_length, group_ids)

    def starts(self, live: LiveRequest, num_tokens: int) -> None:
        """See RequestEvents."""
        # the metrics count separators that leave a window, not those that a hit comes with
        live.holding.num_counted = live.num_spilled(num_tokens)

    def takes_part(self, live: LiveRequest) -> None:
        """See RequestEvents."""
        if self.prefix_cache.is_enabled:
            self.prefix_cache.takes_part(live)
            self.shared_tails.takes_part(live)

    def all_take_part(self) -> None:
        """See RequestEvents."""
        if self.prefix_cache.is_enabled:
            self.prefix_cache.plan_copies()
            self.prefix_cache.joint_prefills.end_step()

    def leaves(self, live: LiveRequest) -> None:
        """See RequestEvents; nothing of what the request held is known afterwards."""
        self.prefix_cache.keep_final_state(live)
        if self._usage is not None:
            self._usage.leaves(live)
        for manager in self.managers:
            manager.sources.leaves(manager.group_state(live).sources)
        live.holding = Holding()

    def may_wrap(self, live: LiveRequest) -> bool:
        """See RequestEvents."""
        return self.shared_tails.may_wrap(live)


def _answer_by_instance(coordinator: HybridKVCacheCoordinator) -> None:
    """Let vLLM ask our managers for hits where several kinds of layers must agree on one.

    UnitaryKVCacheCoordinator asks the manager, this one the manager's class, which knows no
    checkpoints. A manager has all that is used of its class (0.32: find_longest_cache_hit and
    supports_fine_grained_hash_lookup), and its search already starts again with every shorter
    candidate until all kinds agree, so a hit ends at a checkpoint that the other layers have too.
    """
    for number, group in enumerate(coordinator.attention_groups):
        manager = coordinator.single_type_managers[group.group_ids[0]]
        if isinstance(manager, SepLLMManager):
            asked = group._replace(manager_cls=manager)  # type: ignore[arg-type]
            coordinator.attention_groups[number] = asked
