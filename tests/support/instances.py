"""Instances under a test's hand: real schedulers, workers with labels instead of KV.

The test is time and the network. A step is *launched* (scheduled, and its transfers begin), it
*runs*, and it is *answered*. An asynchronous instance launches the next step before the answer of
the last, and what is launched may run late. A state that a decode instance asks for arrives when
the test says so, in any order, in parts, or never.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from zlib import crc32

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from tests.support.findable import Findable
from tests.support.labelled_worker import LabelledWorker, Launch, Scheduled
from tests.support.schedulers import (
    BLOCK,
    SEPARATOR,
    Setting,
    make_request,
    make_scheduler,
    starts,
)
from vllm_sepllm.integration.scheduler.manager import SepLLMManager
from vllm_sepllm.integration.wire.plan import attached_plan
from vllm_sepllm.policy.visibility import Policy

# blocks of a state, by KV cache group
Blocks = list[list[int]]
# ends an answer before its last token: an asynchronous instance has a step in flight by then
STOP = 100


def continue_text(tokens: list[int], length: int) -> None:
    """Go on as the model does, to that length: each token is a function of those before it."""
    while len(tokens) < length:
        digest = crc32(bytes(tokens))
        token = SEPARATOR if digest % 10 < 3 else 2 + digest // 10 % 90
        tokens.append(STOP if digest % 31 == 0 else token)


def answer_to(prompt: list[int], max_tokens: int) -> list[int]:
    """What a request is answered with, wherever and however it is computed."""
    text = [*prompt]
    continue_text(text, len(prompt) + max_tokens)
    answer = text[len(prompt) :]
    return answer[: answer.index(STOP) + 1] if STOP in answer else answer


@dataclass(eq=False)
class Read:
    """A state on its way.

    Attributes:
        name: the request of the instance that reads it.
        source: the request of the instance that has it.
        targets: blocks that it goes to.
        sources: blocks that have it.
        missing: the blocks that are still to be read: where each is, where it goes.
    """

    name: str
    source: str
    targets: Blocks
    sources: Blocks

    def __post_init__(self) -> None:
        # of a sliding window vLLM names more blocks than are read, the last ones
        self.missing = [
            pair
            for targets, sources in zip(self.targets, self.sources, strict=True)
            for pair in zip(sources[-len(targets) :], targets, strict=True)
        ]


@dataclass
class Step:
    """A step that is not answered yet.

    Attributes:
        output: the scheduler's.
        launch: the worker's part.
        ends: request for which the step samples a token -> the position of that token.
        news: what the connector knew when the step was launched.
        has_run: whether the worker has done it.
    """

    output: SchedulerOutput
    launch: Launch
    ends: dict[str, int]
    news: KVConnectorOutput
    has_run: bool = False


@dataclass
class Instance:
    """A scheduler and its worker.

    Attributes:
        setting: of the scheduler.
        tokens: request -> what it was answered with.
        params: request that has ended -> what vLLM answers with for the next instance.
        ended: requests that have ended by themselves.
        errors: requests that have ended with an error.
        first_start: request -> tokens it had when it was scheduled last as a new one.
        reads: states that it has asked for and that have not arrived.
        unread: requests of the other instance whose state it does not need.
        in_flight: steps that are launched and not answered, in their order.
    """

    setting: Setting
    tokens: dict[str, list[int]] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    errors: set[str] = field(default_factory=set)
    first_start: dict[str, int] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    in_flight: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = make_scheduler(self.setting)
        self.is_async = self.setting.kind == "async"
        # as on GPUs; vLLM asks the platform how many batches a worker may have
        self.scheduler.defer_block_free = self.is_async and self.scheduler.connector is not None
        kv = self.scheduler.kv_cache_manager
        self.pool = kv.block_pool
        managers = kv.coordinator.single_type_managers
        self._managers = [m for m in managers if isinstance(m, SepLLMManager)]
        self._policies: dict[str, Policy] = {}
        self._apart: dict[str, int] = {}
        ours = [manager.kv_cache_group_id for manager in self._managers]
        self.worker = LabelledWorker(self._policies, kv, ours, self._apart, BLOCK)
        self._findable = Findable(self.scheduler, self.worker)
        # of the step that was scheduled last: blocks that the pool gave, and whether it had no more
        self._handed_out: set[int] = set()
        self._ran_out = False
        get_new_blocks = self.pool.get_new_blocks

        def hand_out(num_blocks: int) -> list[KVCacheBlock]:
            blocks: list[KVCacheBlock] = get_new_blocks(num_blocks)
            self._handed_out.update(block.block_id for block in blocks)
            self._ran_out |= self.pool.get_num_free_blocks() == 0
            return blocks

        self.pool.get_new_blocks = hand_out
        # prompts, and what the model makes of them, as far as it was computed
        self._texts: dict[str, list[int]] = {}
        self._news = KVConnectorOutput(finished_sending=set(), finished_recving=set())

    @property
    def is_empty(self) -> bool:
        """Whether all blocks are free, no request is known and no step is in flight."""
        free = self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        return free and not self.scheduler.requests and not self.in_flight

    def arrive(
        self, name: str, prompt: list[int], max_tokens: int, salt: str | None = None, **extra: Any
    ) -> None:
        """A request; ``extra`` are its extra_args."""
        request = make_request(
            name, prompt, max_tokens, stop=[STOP], extra_args=extra, cache_salt=salt
        )
        self.scheduler.add_request(request)
        policy = self._policies[name] = self.scheduler._live[name].policy
        self._apart[name] = hash((policy.window, policy.initial_tokens, len(salt or "")))
        self._texts[name] = [*(request.prompt_token_ids or ())]
        self.tokens[name] = []

    # ------------------------------------------------------------------ steps

    def step(self) -> None:
        """Launch a step, and answer the oldest if there are more than may be in flight."""
        self.launch()
        if len(self.in_flight) > self.is_async:
            self.answer()

    @property
    def may_launch(self) -> bool:
        """Whether the engine schedules now, rather than wait for an answer."""
        return len(self.in_flight) <= self.is_async

    def launch(self) -> None:
        """Schedule a step, and begin its transfers: they wait for no step."""
        before = {b.block_id: b.block_hash for b in self.pool.blocks if b.block_hash is not None}
        self._handed_out.clear()
        self._ran_out = False
        output = self.scheduler.schedule()
        stay = before.keys() - self._handed_out  # others may have got the keys again that they had
        sealed = {i for i in stay if self.pool.blocks[i].block_hash == before[i]}
        if not self._ran_out and self.pool.get_num_free_blocks():
            # a second block with the key may have been evicted since
            evicted = {before[i] for i in before.keys() & self._handed_out}
            self._findable.check_moved({before[i] for i in stay - sealed} - evicted)
        found = starts(output)
        self.first_start |= {new.req_id: found[new.req_id] for new in output.scheduled_new_reqs}
        plan = attached_plan(output)
        assert plan is not None
        requests, sizes = self.scheduler.requests, output.num_scheduled_tokens
        ends = {name: found[name] + size for name, size in sizes.items()}
        for name, end in ends.items():
            continue_text(self._texts[name], end + 1)
        launch = self.worker.launch(
            [
                Scheduled(requests[name], self._texts[name], found[name], size)
                for name, size in sizes.items()
            ],
            plan,
            output.kv_cache_block_copies or (),
            sealed,
            self._retained(),
        )
        ends = {name: end for name, end in ends.items() if not requests[name].is_prefill_chunk}
        news, self._news = self._news, KVConnectorOutput(set(), set())
        self.in_flight.append(Step(output, launch, ends, news))
        if self.scheduler.connector is not None:
            self._begin(output.kv_connector_metadata)

    def _begin(self, metadata: Any) -> None:
        for name, meta in metadata.reqs_to_recv.items():
            if meta.awaiting_kvs:
                targets, sources = meta.local_block_ids, meta.remote.block_ids
                number = self.worker.num_launched
                self.worker.incoming.update(dict.fromkeys(chain.from_iterable(targets), number))
                self.reads.append(Read(name, meta.remote.request_id, [*targets], [*sources]))
            else:
                self.unread.add(meta.remote.request_id)

    def run(self) -> None:
        """The worker does the oldest step that it has not done."""
        for step in self.in_flight:
            if not step.has_run:
                step.has_run = True
                self.worker.run(step.launch)
                break
        if all(step.has_run for step in self.in_flight):
            self._findable.check()

    def answer(self) -> None:
        """Hand in the oldest step."""
        if not self.in_flight[0].has_run:
            self.run()
        step = self.in_flight.pop(0)
        names = list(step.output.num_scheduled_tokens)
        rows = {name: row for row, name in enumerate(names)}
        sampled = [
            [self._texts[name][step.ends[name]]] if name in step.ends else [] for name in names
        ]
        result = ModelRunnerOutput(names, rows, sampled, kv_connector_output=step.news)
        for outputs in self.scheduler.update_from_output(step.output, result).values():
            for one in outputs.outputs:
                self.tokens[one.request_id] += one.new_token_ids
                if one.kv_transfer_params:
                    self.params[one.request_id] = one.kv_transfer_params
                if one.finish_reason is not None:
                    is_error = str(one.finish_reason) == "error"
                    (self.errors if is_error else self.ended).add(one.request_id)

    # ------------------------------------------------------------------ transfers

    def arrives(self, read: Read, other: "Instance") -> None:
        """What is missing of the state arrives, and the connector says so with the next step."""
        self.receive(read, other, len(read.missing))
        self._news.finished_recving.add(read.name)

    def receive(self, read: Read, other: "Instance", num_blocks: int) -> None:
        """Some blocks of the state arrive; the connector may still fail to get the others."""
        for _ in range(min(num_blocks, len(read.missing))):
            source, target = read.missing.pop()
            assert self.pool.blocks[target].ref_cnt
            assert other.pool.blocks[source].ref_cnt
            self.worker.receive(other.worker, source, target)

    def is_lost(self, read: Read, *, by_block: bool) -> None:
        """The state has not arrived; connectors may say so by request, or by block."""
        self._news.finished_recving.add(read.name)
        if by_block:
            # the last: vLLM would keep the tokens before it
            self._news.invalid_block_ids.add(read.targets[0][-1])
        else:
            self._news.failed_recving.add(read.name)

    def was_read(self, name: str) -> None:
        """Another instance has read the state, or its time is over."""
        if name in self.scheduler.requests:
            self._news.finished_sending.add(name)

    def abort(self, name: str) -> None:
        """The client has gone."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    # ------------------------------------------------------------------ invariants

    def _retained(self) -> Iterable[Any]:
        """Blocks that steps in flight may still write, each with a reference."""
        return chain.from_iterable(blocks for _, blocks in self.scheduler.deferred_frees)

    def check_blocks(self) -> None:
        """No block is leaked, none is freed twice: each reference is somebody's."""
        held = Counter(block.block_id for block in self._retained())
        for name in self.scheduler.requests:
            kv = self.scheduler.kv_cache_manager
            held.update(chain.from_iterable(kv.get_block_ids(name)))
        for manager in self._managers:
            held.update(block.block_id for block in manager.sources.held.values())
        # stands for blocks that a sliding window has left
        del held[self.pool.null_block.block_id]
        for block in self.pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == held[block.block_id], "a leak, or freed twice"
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1 - len(held)
