"""One step of a whole batch: which entries its tokens fill, and which entries move.

Entries are (row of the batch, compact index) pairs; a platform that knows the block table makes
slots of them. A row needs nothing but its own cache if it has one token, or ends inside a + n. The
first rows of that kind are the *library* rows, served by paged attention over compact lengths; all
rows from the first other one on are prefill chunks. vLLM sorts decode rows before the others, so a
row behind a chunk has its separators listed, or is a request's first token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.keys.tiles import PrefillRequests
from vllm_sepllm.policy.step import checkpoint, prefill
from vllm_sepllm.policy.step.plan import BatchRows
from vllm_sepllm.policy.visibility import AnyPolicy, BoolArray, IntArray

_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Moves:
    """Copies of entries inside the caches of a batch; all are read before any is written.

    Attributes:
        rows: [num_moves], row of the batch.
        source: [num_moves], compact index.
        target: [num_moves], compact index.
    """

    rows: IntArray
    source: IntArray
    target: IntArray


@dataclass(frozen=True, slots=True)
class Saves:
    """Copies of entries to slots of checkpoints.

    Attributes:
        rows: [num_saves], row of the batch.
        source: [num_saves], compact index.
        slots: [num_saves], slot of the checkpoint's own blocks.
    """

    rows: IntArray
    source: IntArray
    slots: IntArray


@dataclass(frozen=True, slots=True)
class TokenSaves:
    """Tokens of the step whose KV goes to a checkpoint as well.

    Attributes:
        tokens: [num_saves], rows of activations.
        slots: [num_saves], slot of the checkpoint's own blocks.
    """

    tokens: IntArray
    slots: IntArray


@dataclass(frozen=True, slots=True)
class Rotations:
    """Kept keys whose position changes as an epoch begins (policy/epochs.py).

    Attributes:
        rows: [num_rotations], row of the batch.
        entries: [num_rotations], compact index.
        delta: [num_rotations], new position less old one.
    """

    rows: IntArray
    entries: IntArray
    delta: IntArray


_NO_ROTATIONS = Rotations(_NONE, _NONE, _NONE)
_NO_MOVES, _NO_SAVES = Moves(_NONE, _NONE, _NONE), Saves(_NONE, _NONE, _NONE)
_NO_TOKENS = TokenSaves(_NONE, _NONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStep:
    """What a step does to the caches of its rows, in this order.

    Attributes:
        rotations: keys that get another position.
        commit_spills: separators that leave the ring as proposed tokens are committed.
        commits: proposed tokens that turned out right, staging -> ring.
        saves_before: entries that a checkpoint keeps, as they are before the step.
        spills: separators that leave the ring of a single-token row, ring -> tail.
        first: [num_rows + 1], first token of each row.
        num_library: the first rows, served by the library.
        lengths: [num_library], their compact lengths after the step.
        max_query_len: their longest query; 0 if there are none.
        chunks: the other rows, prefill chunks.
        moves_after: after the chunks' attention, separators that leave their rings.
        token_saves: tokens that a checkpoint keeps.
        rows: [num_tokens], row of the batch of each token.
        target: [num_tokens], compact index that the token fills; -1: its KV is not kept.
        saves_after: entries that a checkpoint keeps, as they are after the step.
    """

    rotations: Rotations = _NO_ROTATIONS
    commit_spills: Moves = _NO_MOVES
    commits: Moves = _NO_MOVES
    saves_before: Saves = _NO_SAVES
    spills: Moves
    first: IntArray
    num_library: int
    lengths: IntArray
    max_query_len: int
    chunks: Sequence[prefill.Chunk] = ()
    moves_after: Moves = _NO_MOVES
    token_saves: TokenSaves = _NO_TOKENS
    rows: IntArray
    target: IntArray
    saves_after: Saves = _NO_SAVES

    @property
    def num_library_tokens(self) -> int:
        """Tokens of the library rows."""
        return int(self.first[self.num_library])

    def prefill_requests(self) -> PrefillRequests:
        """The chunks, for policy/keys/tiles.py."""
        table_row = np.arange(self.num_library, self.num_library + len(self.chunks))
        counts = [len(chunk.separators) for chunk in self.chunks]
        return PrefillRequests(
            table_row=table_row,
            query_start=self.first[table_row],
            chunk_start=np.array([chunk.start for chunk in self.chunks], dtype=np.int64),
            chunk_end=np.array([chunk.end for chunk in self.chunks], dtype=np.int64),
            num_spilled=np.array([chunk.num_spilled for chunk in self.chunks], dtype=np.int64),
            separators=_flat([chunk.separators for chunk in self.chunks]),
            separators_start=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        )


def plan_batch(rows: BatchRows, first: IntArray, num_tokens: int, block_size: int) -> BatchStep:
    """Plan the step.

    Args:
        rows: the step's plan in the order of the batch.
        first: [num_rows + 1], first token of each row.
        num_tokens: tokens of the batch, padding of a CUDA graph included.
        block_size: tokens of a block that the scheduler counts.
    """
    owner = np.zeros(num_tokens, dtype=np.int64)
    target = np.full(num_tokens, -1, dtype=np.int64)
    if not rows.listed:
        return _plan_decode(rows, first, owner, target)
    num_rows, num_new = len(first) - 1, np.diff(first)
    owner[: first[-1]] = np.repeat(np.arange(num_rows), num_new)
    num_library = _num_library(rows, num_new)
    library, until = slice(num_library), int(first[num_library])
    of = owner[:until]
    position = rows.start[of] + np.arange(until) - first[of]
    target[:until] = layout.ring_index(rows.policy.of_rows(of), position)
    chunks = [_chunk(rows, row, first) for row in range(num_library, num_rows)]
    moves_after = _write_chunks(chunks, rows, first, target)

    policy, end = rows.policy.of_rows(library), rows.start[library] + num_new[library]
    num_spilled, spills = rows.num_spilled[library], rows.spills[library]
    commit_spills, commits = _commits(rows)
    saves_before, token_saves, saves_after = _checkpoints(rows, first, block_size)
    return BatchStep(
        rotations=_rotations(rows),
        commit_spills=commit_spills,
        commits=commits,
        saves_before=saves_before,
        spills=spill_copies(policy, target[first[library]], num_spilled, spills),
        first=first,
        num_library=num_library,
        lengths=layout.compact_lengths(policy, end, num_spilled + spills),
        max_query_len=int(num_new[library].max(initial=0)),
        chunks=chunks,
        moves_after=moves_after,
        token_saves=token_saves,
        rows=owner,
        target=target,
        saves_after=saves_after,
    )


def _plan_decode(rows: BatchRows, first: IntArray, owner: IntArray, target: IntArray) -> BatchStep:
    """The step of rows that list no separators: one token each, as in most steps."""
    num_rows = len(rows.start)
    assert first[-1] == num_rows, "the plan of a row of several tokens lists its separators"
    entry = layout.ring_index(rows.policy, rows.start)
    owner[:num_rows], target[:num_rows] = np.arange(num_rows), entry
    return BatchStep(
        rotations=_rotations(rows),
        spills=spill_copies(rows.policy, entry, rows.num_spilled, rows.spills),
        first=first,
        num_library=num_rows,
        lengths=layout.compact_lengths(rows.policy, rows.start + 1, rows.num_spilled + rows.spills),
        max_query_len=1,
        rows=owner,
        target=target,
    )


def spill_copies(
    policy: AnyPolicy, entry: IntArray, num_spilled: IntArray, spills: BoolArray
) -> Moves:
    """Copies ring -> tail, which come before any write: a new token overwrites the one that leaves.

    Args:
        policy: a, n and s of the rows.
        entry: [num_rows], compact index of the new token.
        num_spilled: [num_rows], separators that left the window before the step.
        spills: [num_rows], whether one more leaves in it.
    """
    leaving = spills.nonzero()[0]  # faster than flatnonzero on so few elements
    if len(leaving) == 0 or policy.max_separators == 0:
        return _NO_MOVES
    return Moves(leaving, entry[leaving], layout.tail_index(policy, num_spilled)[leaving])


def _rotations(rows: BatchRows) -> Rotations:
    if rows.positions is None or not rows.positions.renumber:
        return _NO_ROTATIONS
    items = rows.positions.renumber.items()
    return Rotations(*_joined([_of_row(row, new.entries, new.delta) for row, new in items]))


def _num_library(rows: BatchRows, num_new: IntArray) -> int:
    is_library = (num_new == 1) | (rows.start + num_new <= rows.policy.num_dense)
    return len(num_new) if is_library.all() else int(np.argmin(is_library))


def _chunk(rows: BatchRows, row: int, first: IntArray) -> prefill.Chunk:
    start = int(rows.start[row])
    end = start + int(first[row + 1] - first[row])
    listed = rows.listed.get(row)
    assert listed or end == 1, "the plan of a row of several tokens lists its separators"
    separators = listed.separators if listed else _NONE
    num_spilled = int(rows.num_spilled[row])
    return prefill.Chunk(rows.policy.of_row(row), start, end, num_spilled, separators)


def _write_chunks(
    chunks: Sequence[prefill.Chunk], rows: BatchRows, first: IntArray, target: IntArray
) -> Moves:
    """Fill ``target`` for the chunks, which are the last rows; return what moves in their caches.

    Their tokens are not yet in ``target``.
    """
    moved: list[IntArray] = []
    for row, chunk in enumerate(chunks, start=len(first) - 1 - len(chunks)):
        listed = rows.listed.get(row)
        if listed and (staged := listed.staged):
            target[first[row] : first[row + 1]] = staged.entry + np.arange(chunk.end - chunk.start)
            continue
        kept = prefill.survivors(chunk)
        target[first[row] + kept.tokens] = kept.target
        moved.append(_of_row(row, kept.copy_source, kept.copy_target))
    return Moves(*_joined(moved))


def _commits(rows: BatchRows) -> tuple[Moves, Moves]:
    """Copies of the rows' commits: spills, which come first, and tokens, fewer than the window."""
    spills: list[IntArray] = []
    tokens: list[IntArray] = []
    for row, listed in rows.listed.items():
        if (commit := listed.commit) is None:
            continue
        policy, staged = rows.policy.of_row(row), commit.staged
        separators, tail = layout.spilled(policy, commit.num_spilled, commit.separators)
        spills.append(_of_row(row, layout.ring_index(policy, separators), tail))
        position = np.arange(staged.position, commit.end)
        entry = staged.entry + position - staged.position
        tokens.append(_of_row(row, entry, layout.ring_index(policy, position)))
    return Moves(*_joined(spills)), Moves(*_joined(tokens))


def _checkpoints(
    rows: BatchRows, first: IntArray, block_size: int
) -> tuple[Saves, TokenSaves, Saves]:
    """Checkpoints of the step: saves before it, of its tokens, and after it.

    A row of one token saves its blocks once the step is done: a CUDA graph writes each token once.
    """
    before: list[IntArray] = []
    after: list[IntArray] = []
    tokens: list[IntArray] = []
    slots: list[IntArray] = []
    for row, listed in rows.listed.items():
        if not listed.checkpoints:
            continue
        chunk = _chunk(rows, row, first)
        for item in listed.checkpoints:
            if not (blocks := item.blocks[rows.group_id]):
                continue
            own = _own_slots(blocks, block_size)
            if chunk.end - chunk.start == 1:
                length = layout.compact_length(chunk.policy, chunk.end, chunk.num_spilled_after)
                entries = np.flatnonzero(own[:length] >= 0)
                after.append(_of_row(row, entries, own[entries]))
                continue
            part = checkpoint.checkpoint_parts(chunk, item.position, block_size, list(blocks))
            before.append(_of_row(row, part.copy_source, own[part.copy_target]))
            tokens.append(part.tokens + first[row])
            slots.append(own[part.target])
    of_tokens = TokenSaves(_flat(tokens), _flat(slots))
    return Saves(*_joined(before)), of_tokens, Saves(*_joined(after))


def _own_slots(blocks: dict[int, int], block_size: int) -> IntArray:
    """Slot of each compact index in a checkpoint's own blocks, -1 outside them."""
    slots = np.full((max(blocks) + 1, block_size), -1, dtype=np.int64)
    for index, block_id in blocks.items():
        slots[index] = block_id * block_size + np.arange(block_size)
    return slots.reshape(-1)


def _of_row(row: int, *columns: IntArray) -> IntArray:
    return np.stack([np.full(len(columns[0]), row), *columns])


def _joined(parts: list[IntArray]) -> IntArray:
    """Columns [3, num] of all rows, one after the other."""
    return np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), dtype=np.int64)


def _flat(parts: list[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else _NONE
