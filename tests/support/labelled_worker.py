"""A worker whose memory holds labels instead of KV: what request prefix a slot was computed from.

Steps are the planner's, as on every platform (policy/step/batch.py, labelled_cache.py); the oracle
is the rule alone: every read of every step is compared with it, so a write into a shared block, a
stale checkpoint or a wrong copy shows as a wrong label.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, KVCacheBlockCopy
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import Request

from tests.support.labelled_cache import LabelledCache
from tests.support.rule import read_positions
from vllm_sepllm.policy.step.batch import plan_batch
from vllm_sepllm.policy.step.plan import HostTransfers, PlannedCheckpoint, StepPlan
from vllm_sepllm.policy.visibility import Policy

BLOCK = 4


class Label(NamedTuple):
    """Whose KV an entry is.

    Attributes:
        number: tokens up to and including it.
        digest: of these tokens, and of what keeps their request apart from others with the same.
        position: that its key has.
    """

    number: int
    digest: int
    position: int


@dataclass
class Text:
    """A request's tokens, as far as it was asked for.

    Attributes:
        policy: of the request.
        digest: of what was taken in; at first, of what keeps the request apart.
        labels: [num_tokens], at the positions that they have in the text.
        is_separator: [num_tokens].
        reads: query -> key -> its position, by the rule.
    """

    policy: Policy
    digest: int
    labels: list[Label] = field(default_factory=list)
    is_separator: list[int] = field(default_factory=list)
    reads: list[dict[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rule = read_positions(self.policy, self.is_separator, 1 << 30)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in the tokens of the request that are new."""
        for token in tokens[len(self.is_separator) :]:
            self.digest = hash((self.digest, token))
            index = len(self.labels)
            self.labels.append(Label(index + 1, self.digest, index))
            self.is_separator.append(int(token == 1))

    def label(self, index: int, position: int) -> Label:
        """Of the token with that index."""
        label = self.labels[index]
        return label if position == index else label._replace(position=position)

    def wanted(self, query: int) -> list[Label]:
        """What a token reads: keys in the order of the text, each at its position."""
        while len(self.reads) <= query:
            self.reads.append(next(self._rule))
        return [self.label(key, position) for key, position in self.reads[query].items()]


@dataclass
class Scheduled:
    """A request and its part of a step; ``tokens``: of the request, to the end of the part."""

    request: Request
    tokens: Sequence[int]
    start: int
    size: int
    checkpoints: tuple[PlannedCheckpoint, ...] = ()

    @property
    def name(self) -> str:
        return self.request.request_id


@dataclass
class Launch:
    """A step as a worker gets it: what the scheduler does later changes nothing of it.

    Attributes:
        number: of the step.
        parts: in the order that vLLM's model runners give them.
        labels: part -> of the tokens that it computes.
        tables: part -> KV cache group -> its blocks.
        plan: of the step.
        copies: of blocks, before all that the plan says but what it moves to and from host memory.
        ref_counts: of all blocks of the pool.
        sealed: blocks that others may find, but for those that the step itself fills.
    """

    number: int
    parts: list[Scheduled]
    labels: list[list[Label]]
    tables: list[tuple[list[int], ...]]
    plan: StepPlan
    copies: Sequence[KVCacheBlockCopy]
    ref_counts: list[int]
    sealed: set[int]


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
        self.others: dict[tuple[int, int], Label] = {}  # of other layers, by block and offset
        self.texts: dict[str, Text] = {}
        self.host: dict[int, list[Label | None]] = {}  # host slot -> what a block had
        self.num_loaded = 0  # blocks
        self.num_launched = 0  # steps
        # block -> steps that were launched when a transfer into it began, which waits for none
        self.incoming: dict[int, int] = {}
        self._launch: Launch  # the step that runs

    def copy_block(self, source: int, target: int) -> None:
        self.check_order(target)
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
        size = self.block_size
        for slot, block in transfers.saves.items():
            self.host[slot] = [self.memory.get(block * size + i) for i in range(size)]
        self.num_loaded += len(transfers.loads)
        for block, slot in transfers.loads.items():
            for i, label in enumerate(self.host[slot]):
                self.memory[block * size + i] = label

    def launch(
        self,
        scheduled: Sequence[Scheduled],
        plan: StepPlan,
        copies: Sequence[KVCacheBlockCopy],
        sealed: set[int],
        retained: Iterable[KVCacheBlock] = (),
    ) -> Launch:
        """A step of all its requests.

        ``retained``: blocks, each for a reference that says when the block may be reused, and not
        that somebody reads it.
        """
        num_retained = Counter(block.block_id for block in retained)
        pool = self.kv.block_pool.blocks
        parts = sorted(scheduled, key=lambda part: part.size > 1 or part.start == 0)
        self.num_launched += 1
        return Launch(
            number=self.num_launched,
            parts=parts,
            labels=[self.labels(part, plan) for part in parts],
            tables=[tuple(map(list, self.kv.get_block_ids(part.name))) for part in parts],
            plan=plan,
            copies=copies,
            ref_counts=[block.ref_cnt - num_retained[block.block_id] for block in pool],
            sealed=sealed,
        )

    def run(self, launch: Launch) -> None:
        """Do what a step says; steps run in the order in which they were launched."""
        self._launch, plan, labels = launch, launch.plan, launch.labels
        if plan.host is not None:
            self.move(plan.host)
        for copy in launch.copies:
            self.copy_block(copy.src_block_id, copy.dst_block_id)
        if not launch.parts:
            return
        order = np.array([plan.rows[part.name] for part in launch.parts], dtype=np.int64)
        first, size = np.cumsum([0, *map(len, labels)]), self.block_size
        for group_id in range(len(self.kv.kv_cache_config.kv_cache_groups)):
            own = [table[group_id] for table in launch.tables]
            if group_id not in self.ours:
                for blocks, part, new in zip(own, launch.parts, labels, strict=True):
                    self.other_layers(group_id, blocks, self.texts[part.name], new)
                continue
            step = plan_batch(plan.of(order, group_id), first, int(first[-1]), size)

            def slot(row: int, entry: int, own: list[list[int]] = own) -> int:
                return own[row][entry // size] * size + entry % size

            reads = iter(self.play(step, list(chain.from_iterable(labels)), slot))
            for part, new in zip(launch.parts, labels, strict=True):
                for query in new:
                    wanted = self.texts[part.name].wanted(query.number - 1)
                    assert sorted(next(reads)) == wanted, part.name

    def text(self, name: str, tokens: Sequence[int]) -> Text:
        """Of the request that has that name, with these tokens at least."""
        if name not in self.texts:
            self.texts[name] = Text(self.policies[name], hash((self.apart[name],)))
        self.texts[name].extend(tokens)
        return self.texts[name]

    def labels(self, part: Scheduled, plan: StepPlan) -> list[Label]:
        """Of the tokens that the request computes."""
        text = self.text(part.name, part.tokens)
        shift = 0 if plan.positions is None else int(plan.positions.shift[plan.rows[part.name]])
        return [text.label(i, i - shift) for i in range(part.start, part.start + part.size)]

    def rotated(self, label: Label, delta: int) -> Label:
        return label._replace(position=label.position + delta)

    def other_layers(self, group_id: int, own: list[int], text: Text, labels: list[Label]) -> None:
        """vLLM's own layers write every token and read theirs by position."""
        spec = self.kv.kv_cache_config.kv_cache_groups[group_id].kv_cache_spec
        window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else 1000

        def slot(position: int) -> tuple[int, int]:
            return own[position // spec.block_size], position % spec.block_size

        for label in labels:
            self.others[slot(label.number - 1)] = label
        for label in labels:
            for i in range(max(0, label.number - window), label.number):
                assert self.others[slot(i)] == text.label(i, i)

    def write(self, slot: Hashable, label: Label) -> None:
        assert isinstance(slot, int)
        block_id = slot // self.block_size
        assert self._launch.ref_counts[block_id] == 1, "a shared block is written"
        assert block_id not in self._launch.sealed, "a block of a checkpoint is written"
        self.check_order(block_id)
        super().write(slot, label)

    def _keep(self, slot: Hashable, label: Label, saved: set[Hashable]) -> None:
        assert isinstance(slot, int)
        self.check_order(slot // self.block_size)
        super()._keep(slot, label, saved)

    def check_order(self, block_id: int) -> None:
        """The step writes a block."""
        is_behind = self._launch.number > self.incoming.get(block_id, 0)
        assert is_behind, "a step writes a block that a transfer fills"
