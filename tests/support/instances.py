"""A prefill and a decode instance: real schedulers, workers with labels instead of KV.

The test is the network: a state that the decode instance asks for arrives when the test says so, in
any order, or is lost.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from tests.support.labelled_worker import LabelledWorker, Scheduled
from tests.support.schedulers import BLOCK, Setting, make_request, make_scheduler, starts
from vllm_sepllm.integration.scheduler.manager import SepLLMManager
from vllm_sepllm.integration.wire.plan import attached_plan
from vllm_sepllm.policy.visibility import Policy

# blocks of a state, by KV cache group
Blocks = list[list[int]]


@dataclass
class Read:
    """A state on its way.

    Attributes:
        name: the request of the instance that reads it.
        source: the request of the instance that has it.
        targets: blocks that it goes to.
        sources: blocks that have it.
    """

    name: str
    source: str
    targets: Blocks
    sources: Blocks


@dataclass
class Instance:
    """A scheduler and its worker.

    Attributes:
        setting: of the scheduler.
        tokens: request -> what it has sampled.
        params: request that has ended -> what vLLM answers with for the next instance.
        errors: requests that have ended with an error.
        first_start: request -> tokens it had when it was scheduled last as a new one.
        reads: states that it has asked for and that have not arrived.
        unread: requests of the other instance whose state it does not need.
    """

    setting: Setting
    tokens: dict[str, list[int]] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    errors: set[str] = field(default_factory=set)
    first_start: dict[str, int] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.scheduler = make_scheduler(self.setting)
        kv = self.scheduler.kv_cache_manager
        self.pool = kv.block_pool
        managers = kv.coordinator.single_type_managers
        ours = [m.kv_cache_group_id for m in managers if isinstance(m, SepLLMManager)]
        self.policies: dict[str, Policy] = {}
        self._apart: dict[str, int] = {}
        self.worker = LabelledWorker(self.policies, kv, ours, self._apart, BLOCK)
        self._news = KVConnectorOutput(finished_sending=set(), finished_recving=set())

    @property
    def is_empty(self) -> bool:
        """Whether all blocks are free and no request is known."""
        free = self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        return free and not self.scheduler.requests

    def arrive(self, name: str, prompt: list[int], max_tokens: int, **extra: Any) -> None:
        """A request; ``extra`` are its extra_args."""
        request = make_request(name, prompt, max_tokens, extra_args=extra)
        self.scheduler.add_request(request)
        policy = self.policies[name] = self.scheduler._live[name].policy
        self._apart[name] = 1 + 10 * policy.window + 10_000 * policy.initial_tokens
        self.tokens[name] = []

    def step(self, sampled: int) -> None:
        """Schedule, read and write as a worker does, and hand in the sampled token."""
        output = self.scheduler.schedule()
        found = starts(output)
        self.first_start |= {new.req_id: found[new.req_id] for new in output.scheduled_new_reqs}
        for copy in output.kv_cache_block_copies or ():
            self.worker.copy_block(copy.src_block_id, copy.dst_block_id)
        scheduled = [
            Scheduled(self.scheduler.requests[name], found[name], size)
            for name, size in output.num_scheduled_tokens.items()
        ]
        plan = attached_plan(output)
        assert plan is not None
        self.worker.forward(scheduled, plan)
        for name, meta in output.kv_connector_metadata.reqs_to_recv.items():
            if meta.awaiting_kvs:
                targets, sources = meta.local_block_ids, meta.remote.block_ids
                self.reads.append(Read(name, meta.remote.request_id, [*targets], [*sources]))
            else:
                self.unread.add(meta.remote.request_id)
        names = list(output.num_scheduled_tokens)
        rows = {name: row for row, name in enumerate(names)}
        tokens = [[] if self.scheduler.requests[n].is_prefill_chunk else [sampled] for n in names]
        news, self._news = self._news, KVConnectorOutput(set(), set())
        result = ModelRunnerOutput(names, rows, tokens, kv_connector_output=news)
        for ended in self.scheduler.update_from_output(output, result).values():
            for one in ended.outputs:
                self.tokens[one.request_id] += one.new_token_ids
                if one.kv_transfer_params:
                    self.params[one.request_id] = one.kv_transfer_params
                if one.finish_reason is not None and str(one.finish_reason) == "error":
                    self.errors.add(one.request_id)

    def arrives(self, read: Read, other: "Instance") -> None:
        """The state has arrived, and its blocks here are still the request's."""
        for targets, sources in zip(read.targets, read.sources, strict=True):
            # of a sliding window vLLM names more blocks than are read, the last ones
            for target, source in zip(targets, sources[-len(targets) :], strict=True):
                assert self.pool.blocks[target].ref_cnt
                assert other.pool.blocks[source].ref_cnt
                self.worker.receive(other.worker, source, target)
        self._news.finished_recving.add(read.name)

    def is_lost(self, read: Read, *, by_block: bool) -> None:
        """The state has not arrived; connectors may say so by request, or by block."""
        self._news.finished_recving.add(read.name)
        if by_block:
            self._news.invalid_block_ids.add(read.targets[-1][-1])
        else:
            self._news.failed_recving.add(read.name)

    def was_read(self, name: str) -> None:
        """Another instance has read the state, or its time is over."""
        if name in self.scheduler.requests:
            self._news.finished_sending.add(name)

    def abort(self, name: str) -> None:
        """The client has gone."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
