"""vLLM's schedulers, counting compact entries and sending each step's plan along.

Nothing flows back from the workers: what is kept depends on token ids and positions alone.
"""

import time
from dataclasses import replace
from itertools import chain
from typing import Any

from vllm.compilation.cuda_graph import CUDAGraphStat
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.outputs import RequestError
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.perf import PerfStats
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus, StreamingUpdate
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_sepllm.integration.log import logger
from vllm_sepllm.integration.scheduler.coordinator import SepLLMCoordinator
from vllm_sepllm.integration.scheduler.live_requests import LiveRequest, LiveRequests
from vllm_sepllm.integration.scheduler.step_planner import StepPlanner
from vllm_sepllm.integration.scheduler.transfer import StateDescriptions
from vllm_sepllm.integration.wire import choices
from vllm_sepllm.integration.wire.config import read_config
from vllm_sepllm.integration.wire.host_memory import block_bytes, num_host_slots
from vllm_sepllm.integration.wire.plan import attach_plan
from vllm_sepllm.integration.wire.spec import max_proposed, num_staging
from vllm_sepllm.policy.step.plan import StepPlan
from vllm_sepllm.policy.visibility import Policy


class SepLLMScheduler(Scheduler):
    """Schedules by compact entries; as it stands, for platforms without asynchronous scheduling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # since vLLM 0.33; only drafters that refusals.py refuses have any
        num_ahead = getattr(self.vllm_config, "num_hash_lookahead_tokens", 0)
        assert num_ahead == 0, "a checkpoint's key must not depend on the tokens behind it"
        config = read_config(self.vllm_config)
        self._states = StateDescriptions(self.vllm_config)
        self._limits = choices.request_limits(self.vllm_config, config)
        self._live = LiveRequests(config.separators, config.policy)
        most_proposed = max_proposed(self.vllm_config)
        self._coordinator = SepLLMCoordinator(
            self.kv_cache_manager.coordinator,
            self._live,
            config.checkpoint_interval,
            num_staging=num_staging(self.vllm_config),
            most_per_step=max(1, most_proposed),
        )
        self._prefix_cache = self._coordinator.prefix_cache
        if self.enable_kv_cache_events and self._prefix_cache.is_enabled:
            algorithm = self.cache_config.prefix_caching_hash_algo
            self._prefix_cache.announce(self.kv_cache_manager, get_hash_fn_by_name(algorithm))
        num_slots = num_host_slots(self.vllm_config, self.kv_cache_config)
        if num_slots is not None:
            self._prefix_cache.offload(num_slots)
        self._planner = StepPlanner(
            self._live,
            self._prefix_cache.plan_checkpoints,
            self._prefix_cache.interval_of,
            most_proposed,
            self.hash_block_size if self._prefix_cache.is_enabled else None,
        )
        # vLLM asks _mamba_block_aligned_split where a chunk must end; models with Mamba are refused
        self.need_mamba_block_aligned_split = config.max_position is not None
        self._usage = self._coordinator.watch(self.max_model_len) if self.log_stats else None

    @property
    def _block_bytes(self) -> int:
        """Of a block of the pool, of all workers together."""
        return block_bytes(self.vllm_config, self.kv_cache_config)

    def make_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None = None,
        kv_connector_stats: KVConnectorStats | None = None,
        cudagraph_stats: CUDAGraphStat | None = None,
        perf_stats: PerfStats | None = None,
        ec_connector_stats: ECConnectorStats | None = None,
    ) -> SchedulerStats | None:
        """vLLM's statistics of a step and what we report beside them; None if switched off."""
        stats: SchedulerStats | None = super().make_stats(
            spec_decoding_stats, kv_connector_stats, cudagraph_stats, perf_stats, ec_connector_stats
        )
        if stats is not None and self._usage is not None:
            self._usage.report_to(stats)
        return stats

    def add_request(self, request: Request) -> None:
        """See vLLM's Scheduler.add_request; a request may choose its own policy."""
        if request.request_id not in self.requests:
            self._take_in(request)
        super().add_request(request)

    def _take_in(self, request: Request) -> None:
        policy, refusal = self._limits.engine, None
        try:
            policy = self._policy_of(request)
        except ValueError as error:
            refusal = str(error)
            logger.warning("sepllm: request %s ends with an error: %s.", request.request_id, error)
        salt = choices.salted(self._limits, policy, request.cache_salt)
        if salt != request.cache_salt:
            request.cache_salt = salt
            request.block_hashes.clear()
            request.update_block_hashes()
        live = self._live.add(request, policy, refusal)
        # by one that ends at once vLLM's server frees a state that nobody will read
        if refusal is None and live.reads_state and not request.abort_immediately:
            self._check_state(live)
        if self._usage is None or refusal is not None:
            return
        if choices.forgets_its_beginning(self._limits, request):
            self._usage.arrives_unprotected(live)

    def _check_state(self, live: LiveRequest) -> None:
        """Treat a state that does not fit as vLLM treats one that cannot be loaded.

        Without a connector nobody reads it, as in stock vLLM.
        """
        if self.connector is None:
            live.ignores_state = True
            return
        reason = self._states.mismatch(live)
        if reason is None:
            return
        live.ignores_state = True
        is_computed = self.recompute_kv_load_failures
        logger.warning(
            "sepllm: request %s %s, because it cannot start from the state of the prefill "
            'instance: %s; give both instances one additional_config["sepllm"], one block size and '
            "one --tensor-parallel-size, and each request to both as it is.",
            live.request.request_id,
            "computes its prompt here" if is_computed else "ends with an error",
            reason,
        )
        if not is_computed:
            live.refusal = reason

    def _policy_of(self, request: Request) -> Policy:
        """The policy that a request chooses.

        Raises:
            ValueError: if the engine does not serve it, or if its cache would never fit.
        """
        assert request.sampling_params is not None, "sepllm serves no pooling models"
        choices.check_prompt_logprobs(self.vllm_config, request.sampling_params)
        policy = choices.policy_of(self._limits, request)
        if policy != self._limits.engine:
            longest = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
            needed = self._coordinator.most_blocks(policy, request, longest)
            num_blocks = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
            choices.check_fits(needed, num_blocks, longest)
        return policy

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether vLLM may schedule the request now.

        A refused request never: vLLM ends it like one whose grammar is wrong. A request that begins
        like a running prefill waits for what the prefill leaves in the prefix cache.
        """
        live = self._live[request.request_id]
        if live.refusal is not None:
            self._end_with_error(request, live.refusal)
            return False
        was_loading = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
        is_ready: bool = super()._handle_blocked_waiting_request(request)
        if is_ready and was_loading and not self._holds_kv_blocks(request):
            # its state is lost: skipped, it goes to the requests without blocks. Where it is, those
            # behind it would keep the blocks that it needs until it has got them
            return False
        looks_up = self._prefix_cache.is_enabled and request.num_computed_tokens == 0
        if not is_ready or not looks_up or live.reads_state:
            return is_ready
        return not self._prefix_cache.must_wait(live)

    def _update_waiting_for_remote_kv(self, request: Request) -> None:
        """See vLLM's Scheduler; a state that has arrived whole is the request's own from now on."""
        has_failed = request.request_id in self.failed_recving_kv_req_ids
        super()._update_waiting_for_remote_kv(request)
        if has_failed:
            return
        live = self._live[request.request_id]
        live.holding.is_loading = False
        live.holding.keyed_until = 0
        if self._usage is not None:
            groups = self.kv_cache_config.kv_cache_groups
            num_workers = self.vllm_config.parallel_config.tensor_parallel_size
            layer_bytes = [
                len(g.layer_names) * g.kv_cache_spec.page_size_bytes * num_workers for g in groups
            ]
            self._usage.receives(live, self._block_bytes, layer_bytes)

    def _handle_invalid_blocks(
        self, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]
    ) -> set[str]:
        """See vLLM's Scheduler; a state without one of its blocks is lost.

        vLLM keeps the tokens before the block, but a compact block has no place in the text.
        """
        kv = self.kv_cache_manager
        lost = {
            request.request_id
            for request in self.kv_holding_waiting
            if self._live[request.request_id].holding.is_loading
            and not invalid_block_ids.isdisjoint(chain(*kv.get_block_ids(request.request_id)))
        }
        found: set[str] = self._handle_failed_recving(lost)
        return found

    def _end_with_error(self, request: Request, reason: str) -> None:
        """Have vLLM end a request after this step.

        Scheduler.grammar_compile_error_reqs is the one list of such requests that vLLM keeps. Under
        0.33 it is a dict, and the client learns the reason; the set goes with vLLM 0.32.
        """
        failed: Any = self.grammar_compile_error_reqs
        if isinstance(failed, set):
            failed.add(request.request_id)
        else:
            failed[request.request_id] = RequestError("validation_error", reason)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """See vLLM's Scheduler.schedule; requests whose tail becomes a ring begin anew before."""
        if self._pause_state != PauseState.PAUSED_ALL:
            # the last one first, so that they wait in their order
            for request in reversed(self._coordinator.shared_tails.near_the_bound(self.running)):
                self._begin_anew(request)
        output: SchedulerOutput = super().schedule(throttle_prefills)
        return output

    def _begin_anew(self, request: Request) -> None:
        """Preempt a running request as vLLM does in want of blocks; it may go on in this step."""
        self.running.remove(request)
        is_draining = self._pause_state == PauseState.PAUSED_NEW
        self._preempt_request(request, time.monotonic(), drop_stale_output=is_draining)
        # as in reset_prefix_cache: the workers must see it leave and come back
        self.prev_step_scheduled_req_ids.discard(request.request_id)
        if is_draining:  # the pause waits for it, and lets only waiting requests with KV go on
            self.waiting.remove_requests([request])
            self.kv_holding_waiting.prepend_request(request)

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Tokens of a request's step, which ends with the epoch in which it starts.

        vLLM has no other place that says where a chunk must end. To be dropped when it asks a
        manager of the KV cache.
        """
        if num_new_tokens == 1:  # as in most steps, which ask this of every request
            return 1
        epochs = self._live[request.request_id].epochs
        assert epochs is not None, "asked where positions are renumbered"
        start = request.num_computed_tokens + num_new_local_computed_tokens
        end = epochs.at(start, request._all_token_ids).end
        return min(num_new_tokens, end - start)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Attach the plan while ``num_computed_tokens`` still is the start of the step."""
        attach_plan(scheduler_output, self.plan_step(scheduler_output))
        super()._update_after_schedule(scheduler_output)

    def plan_step(self, scheduler_output: SchedulerOutput) -> StepPlan:
        """What the workers must know of the step that was just scheduled."""
        plan = self._planner.plan(scheduler_output)
        if fresh := self._prefix_cache.take_fresh():
            if self.needs_kv_cache_zeroing:  # whoever starts from a checkpoint copies whole blocks
                others = scheduler_output.new_block_ids_to_zero or []
                # workers zero before they copy: what the step's copies read, bytes of ours, stays
                copies = scheduler_output.kv_cache_block_copies or ()
                own = {block.block_id for block in fresh} - {c.src_block_id for c in copies}
                scheduler_output.new_block_ids_to_zero = [*others, *sorted(own)]
            # at once, unless a state could arrive in them before this step has written them
            self._free_cow_retained_blocks(fresh, self.sched_step_seq)
        transfers = self._prefix_cache.take_transfers()
        if transfers is None:
            return plan
        if self._usage is not None:
            self._usage.saves(transfers.saves, self._block_bytes)
        return replace(plan, host=transfers)

    def _get_local_prefix_cache_hit(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        kv, cache = self.kv_cache_manager, self._prefix_cache
        # vLLM 0.32 knows no limit, and 0.33 has one only for what refusals.py refuses
        limit: Any = () if max_cache_hit_length is None else (max_cache_hit_length,)
        live = self._live[request.request_id]
        restored = cache.restore(live, kv.watermark_blocks)
        if restored is not None and self._usage is not None:
            self._usage.restores(live, restored, self._block_bytes)
        hit: tuple[KVCacheBlocks, int, int, bool]
        hit = super()._get_local_prefix_cache_hit(request, *limit)
        blocks, num_tokens, _, _ = hit
        # a state is read whole, unless all of it is here
        is_part = live.reads_state and num_tokens < request.num_tokens - 1
        if num_tokens and (is_part or not cache.fits(kv, request, blocks, num_tokens)):
            return kv.empty_kv_cache_blocks, 0, 0, False
        return hit

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        """A streaming session drops its last sampled token and goes on with new input.

        Drafts that turned out right wait for a step that goes on from them: with new input behind
        them, the session begins anew.
        """
        live = self._live[session.request_id]
        has_staged = live.holding.staged is not None
        if has_staged:
            self.kv_cache_manager.free(session)
        # vLLM 0.32 counts right drafts behind the end of a turn as computed tokens of the session
        session.num_computed_tokens = min(session.num_computed_tokens, session.num_tokens - 1)
        self._live.truncate(live, session.num_computed_tokens)
        super()._update_request_as_session(session, update)
        if has_staged:
            self._begin_turn_anew(session)

    def _begin_turn_anew(self, session: Request) -> None:
        """Have a session without blocks wait among those that have none.

        Among those that hold some it would stop the ones behind it, which keep what it needs.
        """
        session.num_computed_tokens = 0
        if session in self.kv_holding_waiting:
            self.kv_holding_waiting.remove_requests([session])
            self.waiting.prepend_request(session)

    def _free_blocks(self, request: Request) -> None:
        """See vLLM's Scheduler._free_blocks, which forgets the request; so do we."""
        super()._free_blocks(request)
        self._live.forget(request.request_id)


class SepLLMAsyncScheduler(SepLLMScheduler, AsyncScheduler):
    """With asynchronous scheduling: the plan reads tokens that are at least n - 1 steps old."""

    def _handle_stopped_request(self, request: Request) -> bool:
        """A turn of a streaming session has ended: give its blocks back.

        The step in flight computes a token that the session drops, and that token's KV overwrites
        an entry which the tokens that stay may still read. While ``num_computed_tokens`` counts
        that step, the blocks are what it leaves, so they may be found as such. Beside a connector
        that reads states they are kept until it is done: what arrives waits for no step.
        """
        if request.resumable:
            self._free_request_blocks(request)
        is_finished: bool = super()._handle_stopped_request(request)
        return is_finished

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        """Begin the next turn anew, from the prefix cache as far as that reaches."""
        super()._update_request_as_session(session, update)
        self._begin_turn_anew(session)
