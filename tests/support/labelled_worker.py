"""A worker whose memory holds labels instead of KV: what request prefix a slot was computed from.

Steps are the planner's, as on every platform (policy/step/batch.py, labelled_cache.py); the oracle
is the rule alone: every read of every step is compared with it, so a write into a shared block, a
stale checkpoint or a wrong copy shows as a wrong label.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import Request

from tests.support.labelled_cache import LabelledCache
from tests.support.rule import read_positions
from vllm_sepllm.policy.step.batch import plan_batch
from vllm_sepllm.policy.step.plan import HostTransfers, PlannedCheckpoint, StepPlan
from vllm_sepllm.policy.visibility import Policy

BLOCK = 4
# whose KV it is: what keeps it apart from equal tokens, then the tokens up to and including it
Tokens = tuple[int, ...]
# and the position that its key has
Label = tuple[Tokens, int]


@dataclass
class Wanted:
    """What the queries of a request read, as far as it was asked for."""

    policy: Policy
    is_separator: list[int] = field(default_factory=list)
    reads: list[dict[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rule = read_positions(self.policy, self.is_separator, 1 << 30)

    def at(self, query: Tokens) -> list[Label]:
        """By the token of the query: keys in the order of the text, each at its position."""
        last = len(query) - 2
        self.is_separator += [int(token == 1) for token in query[len(self.is_separator) + 1 :]]
        while len(self.reads) <= last:
            self.reads.append(next(self._rule))
        return [(query[: key + 2], position) for key, position in self.reads[last].items()]


@dataclass
class Scheduled:
    """A request and its part of a step."""

    request: Request
    start: int
    size: int
    checkpoints: tuple[PlannedCheckpoint, ...] = ()

    @property
    def name(self) -> str:
        return self.request.request_id


class LabelledWorker(LabelledCache):
    """The layers of all KV cache groups; ``apart`` tells requests with equal tokens apart."""

    def __init__(
        self,
        policies: Mapping[str, Policy],
        kv: KVCacheManager,
        ours: Sequence[int],
        apart: Mapping[str, int],
        block_size: int = BLOCK,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.policies = policies
        self.kv = kv
        self.ours = ours
        self.apart = apart
        self.others: dict[tuple[int, int], Tokens] = {}  # of other layers, by block and offset
        self.wanted: dict[str, Wanted] = {}
        self.sealed: set[int] = set()
        self.host: dict[int, list[Label | None]] = {}  # host slot -> what a block had
        self.num_loaded = 0  # blocks

    def copy_block(self, source: int, target: int) -> None:
        self.receive(self, source, target)

    def receive(self, other: "LabelledWorker", source: int, target: int) -> None:
        """Copy a block of another worker's, whatever kind of layer it belongs to."""
        size = self.block_size
        for offset in range(size):
            # a block's slots past its entries were never written
            if source * size + offset in other.memory:
                self.memory[target * size + offset] = other.memory[source * size + offset]
            if (source, offset) in other.others:
                self.others[target, offset] = other.others[source, offset]

    def move(self, transfers: HostTransfers) -> None:
        """Between device and host, in this order."""
        offsets = range(BLOCK)
        for slot, block in transfers.saves.items():
            self.host[slot] = [self.memory.get(block * BLOCK + i) for i in offsets]
        self.num_loaded += len(transfers.loads)
        for block, slot in transfers.loads.items():
            for i, label in zip(offsets, self.host[slot], strict=True):
                self.memory[block * BLOCK + i] = label

    def forward(self, scheduled: Sequence[Scheduled], plan: StepPlan) -> None:
        """A step of all its requests, in the order that vLLM's model runners give them."""
        batch = sorted(scheduled, key=lambda part: part.size > 1 or part.start == 0)
        labels = [self.labels(part, plan) for part in batch]
        tables = [self.kv.get_block_ids(part.name) for part in batch]
        order = np.array([plan.rows[part.name] for part in batch], dtype=np.int64)
        first, size = np.cumsum([0, *map(len, labels)]), self.block_size
        for group_id in range(len(self.kv.kv_cache_config.kv_cache_groups)):
            own = [table[group_id] for table in tables]
            if group_id not in self.ours:
                for blocks, part in zip(own, labels, strict=True):
                    self.other_layers(group_id, blocks, [tokens for tokens, _ in part])
                continue
            step = plan_batch(plan.of(order, group_id), first, int(first[-1]), size)

            def slot(row: int, entry: int, own: list[list[int]] = own) -> int:
                return own[row][entry // size] * size + entry % size

            reads = iter(self.play(step, list(chain.from_iterable(labels)), slot))
            for part, queries in zip(batch, labels, strict=True):
                for query in queries:
                    self.check_reads(part.name, query[0], next(reads))

    def labels(self, part: Scheduled, plan: StepPlan) -> list[Label]:
        """Of the tokens that the request computes."""
        tokens, end = list(part.request.all_token_ids), part.start + part.size
        shift = 0 if plan.positions is None else int(plan.positions.shift[plan.rows[part.name]])
        own = self.apart[part.name]
        return [((own, *tokens[: i + 1]), i - shift) for i in range(part.start, end)]

    def rotated(self, label: Label, delta: int) -> Label:
        return label[0], label[1] + delta

    def other_layers(self, group_id: int, own: list[int], labels: list[Tokens]) -> None:
        """vLLM's own layers write every token and read theirs by position."""
        spec = self.kv.kv_cache_config.kv_cache_groups[group_id].kv_cache_spec
        window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else 1000

        def slot(position: int) -> tuple[int, int]:
            return own[position // spec.block_size], position % spec.block_size

        for label in labels:
            self.others[slot(len(label) - 2)] = label
        for label in labels:
            last = len(label) - 1
            for i in range(max(0, last - window), last):
                assert self.others[slot(i)] == label[: i + 2]

    def check_reads(self, name: str, query: Tokens, read: list[Label]) -> None:
        if name not in self.wanted:
            self.wanted[name] = Wanted(self.policies[name])
        assert sorted(read, key=lambda label: len(label[0])) == self.wanted[name].at(query)

    def write(self, slot: Hashable, label: Label) -> None:
        assert isinstance(slot, int)
        block = self.kv.block_pool.blocks[slot // self.block_size]
        assert block.ref_cnt == 1, "a shared block is written"
        assert block.block_id not in self.sealed, "a block of a checkpoint is written"
        super().write(slot, label)
