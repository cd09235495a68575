"""A worker whose memory holds labels instead of KV: what request prefix a slot was computed from.

Every read of every step is compared with the rule, so a write into a shared block, a stale
checkpoint or a wrong copy shows as a wrong label.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import Request

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.step import checkpoint, decode, prefill
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


class LabelledWorker:
    """The layers of all KV cache groups; ``apart`` tells requests with equal tokens apart."""

    def __init__(
        self,
        policies: Mapping[str, Policy],
        kv: KVCacheManager,
        ours: Sequence[int],
        apart: Mapping[str, int],
    ) -> None:
        self.policies = policies
        self.kv = kv
        self.ours = ours
        self.apart = apart
        self.memory: dict[int, Label] = {}  # of SepLLM layers, by slot
        self.others: dict[tuple[int, int], Label] = {}  # of the rest, by block and offset
        self.sealed: set[int] = set()

    def copy_block(self, source: int, target: int) -> None:
        for offset in range(BLOCK):
            self.move(source * BLOCK + offset, target * BLOCK + offset)

    def forward(self, part: Scheduled, plan: StepPlan) -> None:
        self.policy = self.policies[part.name]
        tables = self.kv.get_block_ids(part.name)
        tokens, end = list(part.request.all_token_ids), part.start + part.size
        labels = [(self.apart[part.name], *tokens[: i + 1]) for i in range(part.start, end)]
        row = plan.rows[part.name]
        separators = plan.separators.get(row, np.array([], dtype=np.int64))
        num_spilled = plan.num_spilled[row : row + 1]
        chunk = prefill.Chunk(self.policy, part.start, end, int(num_spilled[0]), separators)
        for group_id, own in enumerate(tables):
            if group_id not in self.ours:
                self.other_layers(group_id, own, labels)
                continue
            for planned in part.checkpoints:
                blocks = planned.blocks[group_id]
                if blocks:
                    self.fill(chunk, planned.position, blocks, own, labels)
            if part.size == 1:
                self.decode(own, labels[0], num_spilled, plan.spills[row : row + 1])
            else:
                self.prefill(chunk, own, labels)

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

    def fill(
        self,
        chunk: prefill.Chunk,
        position: int,
        blocks: dict[int, int],
        own: list[int],
        labels: list[Label],
    ) -> None:
        part = checkpoint.checkpoint_parts(chunk, position, BLOCK, list(blocks))
        for source, target in zip(part.copy_source, part.copy_target, strict=True):
            self.move(self.slot(own, source), self.slot(blocks, target))
        for token, target in zip(part.tokens, part.target, strict=True):
            self.memory[self.slot(blocks, target)] = labels[token]

    def decode(
        self, own: list[int], label: Label, num_spilled: np.ndarray, spills: np.ndarray
    ) -> None:
        start = np.array([len(label) - 2])
        spilled = decode.spill_copies(self.policy, start, num_spilled, spills)
        for source, target in zip(spilled.source, spilled.target, strict=True):
            self.move(self.slot(own, source), self.slot(own, target))
        self.write(own, int(layout.ring_index(self.policy, start)[0]), label)
        length = decode.compact_lengths(self.policy, start + 1, num_spilled, spills)[0]
        self.check_reads(label, [self.memory[self.slot(own, i)] for i in range(length)])

    def prefill(self, chunk: prefill.Chunk, own: list[int], labels: list[Label]) -> None:
        keys = [self.memory[self.slot(own, i)] for i in range(chunk.num_cached)] + labels
        for tile in prefill.query_tiles(chunk, 7):
            for row in range(tile.last - tile.first):
                num_full = len(tile.keys) - tile.hidden.shape[1]
                seen = np.delete(tile.keys, num_full + np.flatnonzero(tile.hidden[row]))
                self.check_reads(labels[tile.first + row], [keys[k] for k in seen])
        kept = prefill.survivors(chunk)
        old = [self.memory[self.slot(own, s)] for s in kept.copy_source]
        for label, target in zip(old, kept.copy_target, strict=True):
            self.write(own, int(target), label)
        for token, target in zip(kept.tokens, kept.target, strict=True):
            self.write(own, int(target), labels[token])

    def check_reads(self, query: Label, read: list[Label]) -> None:
        mask = visible_mask(self.policy, np.array(query[1:]) == 1)[-1]
        want = [query[: j + 2] for j in np.flatnonzero(mask)]
        assert sorted(read, key=len) == want

    @staticmethod
    def slot(blocks: "list[int] | dict[int, int]", compact: int) -> int:
        return blocks[int(compact) // BLOCK] * BLOCK + int(compact) % BLOCK

    def move(self, source: int, target: int) -> None:
        # a block's slots past its entries were never written
        if source in self.memory:
            self.memory[target] = self.memory[source]

    def write(self, own: list[int], compact: int, label: Label) -> None:
        block = self.kv.block_pool.blocks[own[compact // BLOCK]]
        assert block.ref_cnt == 1, "a shared block is written"
        assert block.block_id not in self.sealed, "a block of a checkpoint is written"
        self.memory[self.slot(own, compact)] = label
