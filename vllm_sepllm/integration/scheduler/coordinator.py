"""Puts our managers to work under vLLM's KV cache coordinators."""

from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, KVCacheCoordinator
from vllm.v1.request import Request

from vllm_sepllm.integration.log import logger
from vllm_sepllm.integration.scheduler.live_requests import RequestSeparators
from vllm_sepllm.integration.scheduler.manager import SepLLMManager
from vllm_sepllm.integration.scheduler.prefix_cache.cache import PrefixCache
from vllm_sepllm.integration.scheduler.shared_tails import SharedTails
from vllm_sepllm.policy.visibility import Policy


def bind_managers(
    coordinator: KVCacheCoordinator,
    separators: RequestSeparators,
    checkpoint_interval: int,
    num_staging: int = 0,
    tails: SharedTails | None = None,
) -> PrefixCache:
    """Give the managers of all SepLLM groups the requests' tokens and one prefix cache.

    Args:
        coordinator: the scheduler's.
        separators: of its requests.
        checkpoint_interval: tokens between regular checkpoints.
        num_staging: entries of each request beyond its compact length (policy/step/staging.py).
        tails: of the requests; None: nobody looks at those that run.
    """
    every = coordinator.single_type_managers
    managers = [m for m in every if isinstance(m, SepLLMManager)]
    are_alone = len(managers) == len(every)
    alignment = 1 if are_alone else coordinator.scheduler_block_size
    tails = tails or SharedTails(separators, 1)
    cache = PrefixCache(managers, separators, checkpoint_interval, alignment)
    interval = cache.interval_of(separators.policy)
    if managers[0].enable_caching and interval != checkpoint_interval:
        logger.warning(
            "sepllm leaves a checkpoint every %d tokens, not every %d: prefixes end where all "
            "kinds of layers have a block boundary.",
            interval,
            checkpoint_interval,
        )
    for number, manager in enumerate(managers):
        manager.bind(separators, cache, tails, num_staging, is_first=number == 0)
    if isinstance(coordinator, HybridKVCacheCoordinator):
        _answer_by_instance(coordinator)
    return cache


def most_blocks(
    coordinator: KVCacheCoordinator, policy: Policy, request: Request, num_tokens: int
) -> int:
    """The most blocks that a new request holds at once by the time it has ``num_tokens`` tokens."""
    total = 0
    for manager in coordinator.single_type_managers:
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


def _answer_by_instance(coordinator: HybridKVCacheCoordinator) -> None:
    """Let vLLM ask our managers for hits where several kinds of layers must agree on one.

    Its other coordinator asks the manager; this one asks the manager's class, which knows no
    checkpoints. An instance has all that it uses of the class (0.32: find_longest_cache_hit and
    supports_fine_grained_hash_lookup), and its search already starts again with every shorter
    candidate until all kinds agree, so a hit ends at a checkpoint that the other layers have too.
    """
    for number, group in enumerate(coordinator.attention_groups):
        manager = coordinator.single_type_managers[group.group_ids[0]]
        if isinstance(manager, SepLLMManager):
            asked = group._replace(manager_cls=manager)  # type: ignore[arg-type]
            coordinator.attention_groups[number] = asked
