"""A worker whose memory holds labels instead of KV: what request prefix a slot was computed from.

Steps are the planner's, as on every platform (policy/step/batch.py, labelled_cache.py); the oracle
is the rule alone: every read of every step is compared with it, so a write into a shared block, a
stale checkpoint or a wrong copy shows as a wrong label.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import Request

from tests.support.labelled_cache import LabelledCache
from vllm_sepllm.policy.step.batch import plan_batch
from vllm_sepllm.policy.step.plan import PlannedCheckpoint, StepPlan
from vllm_sepllm.policy.visibility import Policy, visible_mask

BLOCK = 4
# whose KV it is: what keeps it apart from equal tokens, then the tokens up to and including it
Label = tuple[int, ...]


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
    ) -> None:
        super().__init__()
        self.policies = policies
        self.kv = kv
        self.ours = ours
        self.apart = apart
        self.others: dict[tuple[int, int], Label] = {}  # of other layers, by block and offset
        self.sealed: set[int] = set()

    def copy_block(self, source: int, target: int) -> None:
        for offset in range(BLOCK):
            # a block's slots past its entries were never written
            if source * BLOCK + offset in self.memory:
                self.memory[target * BLOCK + offset] = self.memory[source * BLOCK + offset]

    def forward(self, scheduled: Sequence[Scheduled], plan: StepPlan) -> None:
        """A step of all its requests, in the order that vLLM's model runners give them."""
        batch = sorted(scheduled, key=lambda part: part.size > 1 or part.start == 0)
        labels = [self.labels(part) for part in batch]
        tables = [self.kv.get_block_ids(part.name) for part in batch]
        order = np.array([plan.rows[part.name] for part in batch], dtype=np.int64)
        first = np.cumsum([0, *map(len, labels)])
        for group_id in range(len(self.kv.kv_cache_config.kv_cache_groups)):
            own = [table[group_id] for table in tables]
            if group_id not in self.ours:
                for blocks, part in zip(own, labels, strict=True):
                    self.other_layers(group_id, blocks, part)
                continue
            step = plan_batch(plan.of(order, group_id), first, int(first[-1]), BLOCK)

            def slot(row: int, entry: int, own: list[list[int]] = own) -> int:
                return own[row][entry // BLOCK] * BLOCK + entry % BLOCK

            reads = iter(self.play(step, list(chain.from_iterable(labels)), slot))
            for part, queries in zip(batch, labels, strict=True):
                for query in queries:
                    self.check_reads(self.policies[part.name], query, next(reads))

    def labels(self, part: Scheduled) -> list[Label]:
        """Of the tokens that the request computes."""
        tokens, end = list(part.request.all_token_ids), part.start + part.size
        return [(self.apart[part.name], *tokens[: i + 1]) for i in range(part.start, end)]

    def other_layers(self, group_id: int, own: list[int], labels: list[Label]) -> None:
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

    def check_reads(self, policy: Policy, query: Label, read: list[Label]) -> None:
        mask = visible_mask(policy, np.array(query[1:]) == 1)[-1]
        want = [query[: j + 2] for j in np.flatnonzero(mask)]
        assert sorted(read, key=len) == want

    def write(self, slot: Hashable, label: Label) -> None:
        assert isinstance(slot, int)
        block = self.kv.block_pool.blocks[slot // BLOCK]
        assert block.ref_cnt == 1, "a shared block is written"
        assert block.block_id not in self.sealed, "a block of a checkpoint is written"
        super().write(slot, label)
