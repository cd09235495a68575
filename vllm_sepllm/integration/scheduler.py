"""vLLM's schedulers, counting compact entries and sending each step's plan along.

Nothing flows back from the workers: what is kept depends on token ids and positions alone.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request, StreamingUpdate

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.integration.manager import SepLLMManager
from vllm_sepllm.integration.request_separators import RequestSeparators
from vllm_sepllm.integration.step_planner import StepPlanner
from vllm_sepllm.integration.steps import attach_plan
from vllm_sepllm.policy.plan import StepPlan
from vllm_sepllm.policy.separators import flags

# vLLM logs through the handlers of the logger "vllm"; ours must be its child to be seen
logger = init_logger("vllm.plugins.sepllm")


class _SepLLMMixin(Scheduler):
    """What the two schedulers share."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        self._check_prefix_caching(vllm_config, kv_cache_config)
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        config = SepLLMConfig.from_additional_config(self.vllm_config.additional_config)
        vocab_size = self.vllm_config.model_config.get_vocab_size()
        separator_ids = [int(i) for i in config.separators]
        self._separators = RequestSeparators(
            config.policy, flags(separator_ids, vocab_size), self.requests
        )
        assert config.checkpoint_interval is not None, "resolved at start-up"
        self._managers: list[SepLLMManager] = []
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, SepLLMManager):
                manager.bind(self._separators, config.checkpoint_interval)
                self._managers.append(manager)
        # only a lone manager has prefix caching on
        self._planner = StepPlanner(
            self._separators, self._managers[0].take_snapshots, config.checkpoint_interval
        )

    @staticmethod
    def _check_prefix_caching(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        """Switch prefix caching off where layers of two kinds would have to agree on a hit."""
        cache_config = vllm_config.cache_config
        if cache_config.enable_prefix_caching and len(kv_cache_config.kv_cache_groups) > 1:
            cache_config.enable_prefix_caching = False
            logger.warning(
                "Prefix caching is off: sepllm does not support it yet for models that keep "
                "layers of another kind (full_layers, sliding windows)."
            )

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Attach the plan while ``num_computed_tokens`` still is the start of the step."""
        attach_plan(scheduler_output, self.plan_step(scheduler_output))
        super()._update_after_schedule(scheduler_output)

    def plan_step(self, scheduler_output: SchedulerOutput) -> StepPlan:
        """What the workers must know of the step that was just scheduled."""
        plan = self._planner.plan(scheduler_output)
        self._managers[0].release_snapshots()
        return plan

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        with self._managers[0].looking_up(request):
            hit: tuple[KVCacheBlocks, int, int, bool]
            hit = super()._get_local_prefix_cache_hit(request)
            return hit

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        """A streaming session drops its last sampled token and goes on with new input."""
        self._separators.truncate(session.request_id, session.num_computed_tokens)
        super()._update_request_as_session(session, update)

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        freed: tuple[dict[str, Any] | None, dict[str, Any] | None]
        freed = super()._free_request(request, delay_free_blocks)
        self._separators.forget(request.request_id)
        return freed


class SepLLMScheduler(_SepLLMMixin, Scheduler):
    """For platforms without asynchronous scheduling."""


class SepLLMAsyncScheduler(_SepLLMMixin, AsyncScheduler):
    """With asynchronous scheduling: the plan reads tokens that are at least n - 1 steps old."""
