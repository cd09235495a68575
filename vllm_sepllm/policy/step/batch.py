"""One step of a whole batch: which entries its tokens fill, and which entries move.

Entries are (row of the batch, compact index) pairs; whoever knows the block table makes slots of
them. Rows that read no more than their cache come first and form the *library* rows, served by
paged attention over compact lengths; the others are prefill chunks (policy/keys/tiles.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.keys.tiles import PrefillRequests
from vllm_sepllm.policy.step import checkpoint, decode, prefill
from vllm_sepllm.policy.step.plan import BatchRows
from vllm_sepllm.policy.step.staging import commit_moves
from vllm_sepllm.policy.visibility import BatchPolicy, IntArray


@dataclass(frozen=True, slots=True)
class Moves:
    """Copies of entries inside the caches of the batch; targets are entries as well.

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
class BatchStep:
    """What a step does to the caches of its rows, in this order.

    Attributes:
        commit_spills: separators that leave the ring as proposed tokens are committed.
        commits: proposed tokens that turned out right, staging -> ring.
        saves_before: entries that a checkpoint keeps, as they are before the step.
        spills: separators that leave the ring of a single-token row, ring -> tail.
        num_library: the first rows, served by the library.
        num_library_tokens: their tokens.
        lengths: [num_library], their compact lengths after the step.
        max_query_len: their longest query; 0 if there are none.
        requests: the other rows, prefill chunks; None: there are none.
        moves_after: after the chunks' attention, separators that leave their rings.
        saved_tokens: [num_saved], rows of activations whose KV goes to a checkpoint as well.
        saved_slots: [num_saved], slots there.
        rows: [num_tokens], row of the batch of each token.
        target: [num_tokens], compact index that the token fills; -1: its KV is not kept.
        saves_after: entries that a checkpoint keeps, as they are after the step.
    """

    commit_spills: Moves
    commits: Moves
    saves_before: Saves
    spills: Moves
    num_library: int
    num_library_tokens: int
    lengths: IntArray
    max_query_len: int
    requests: PrefillRequests | None
    moves_after: Moves
    saved_tokens: IntArray
    saved_slots: IntArray
    rows: IntArray
    target: IntArray
    saves_after: Saves


def plan_batch(
    policy: BatchPolicy, rows: BatchRows, first: IntArray, num_tokens: int, block_size: int
) -> BatchStep:
    """Plan the step.

    Args:
        policy: a, n and s of the rows.
        rows: the step's plan in the order of the batch, single-token rows first.
        first: [num_rows + 1], first token of each row.
        num_tokens: tokens of the batch, padding of a CUDA graph included.
        block_size: tokens a block.
    """
    num_new = np.diff(first)
    is_library = (num_new == 1) | (rows.start + num_new <= policy.num_dense)
    for row, staged in enumerate(rows.staged):
        is_library[row] &= staged is None
    num_rows = len(num_new)
    num_library = num_rows if is_library.all() else int(np.argmin(is_library))
    owner = np.zeros(num_tokens, dtype=np.int64)
    target = np.full(num_tokens, -1, dtype=np.int64)
    until = int(first[num_library])
    owner[: first[-1]] = np.repeat(np.arange(num_rows), num_new)
    position = rows.start[owner[:until]] + np.arange(until) - first[owner[:until]]
    target[:until] = layout.ring_index(policy.of_rows(owner[:until]), position)

    of_library = slice(num_library)
    start, spilled = rows.start[of_library], rows.num_spilled[of_library]
    spills = rows.spills[of_library]
    own = policy.of_rows(of_library)
    copies = decode.spill_copies(own, start, spilled, spills)
    chunks = [_chunk(policy, rows, row, first) for row in range(num_library, num_rows)]
    moves = _write_chunks(chunks, rows, num_library, first, target)
    commit_spills, commits = _commits(policy, rows)
    before, tokens, slots, after = _checkpoints(policy, rows, first, block_size)
    return BatchStep(
        commit_spills=commit_spills,
        commits=commits,
        saves_before=before,
        spills=Moves(copies.rows, copies.source, copies.target),
        num_library=num_library,
        num_library_tokens=until,
        lengths=decode.compact_lengths(own, start + num_new[of_library], spilled, spills),
        max_query_len=int(num_new[of_library].max(initial=0)),
        requests=_requests(chunks, num_library, first) if chunks else None,
        moves_after=moves,
        saved_tokens=tokens,
        saved_slots=slots,
        rows=owner,
        target=target,
        saves_after=after,
    )


def _chunk(policy: BatchPolicy, rows: BatchRows, row: int, first: IntArray) -> prefill.Chunk:
    separators = rows.separators[row]
    start = int(rows.start[row])
    end = start + int(first[row + 1] - first[row])
    if separators is None:
        # Model Runner V1 puts a prompt of one token among chunks; it reads itself alone
        assert end == 1, "the plan of a row of several tokens lists its separators"
        separators = np.zeros(0, dtype=np.int64)
    return prefill.Chunk(policy.of_row(row), start, end, int(rows.num_spilled[row]), separators)


def _requests(chunks: Sequence[prefill.Chunk], first_row: int, first: IntArray) -> PrefillRequests:
    counts = [len(chunk.separators) for chunk in chunks]
    table_row = np.arange(first_row, first_row + len(chunks))
    return PrefillRequests(
        table_row=table_row,
        query_start=first[table_row],
        chunk_start=np.array([chunk.start for chunk in chunks], dtype=np.int64),
        chunk_end=np.array([chunk.end for chunk in chunks], dtype=np.int64),
        num_spilled=np.array([chunk.num_spilled for chunk in chunks], dtype=np.int64),
        separators=np.concatenate([chunk.separators for chunk in chunks]),
        separators_start=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
    )


def _write_chunks(
    chunks: Sequence[prefill.Chunk],
    rows: BatchRows,
    first_row: int,
    first: IntArray,
    target: IntArray,
) -> Moves:
    """Fill ``target`` for the chunks' tokens; return what moves inside their caches."""
    moved: list[IntArray] = []
    for row, chunk in enumerate(chunks, start=first_row):
        staged = rows.staged[row] if rows.staged else None
        if staged is not None:
            target[first[row] : first[row + 1]] = staged.entry + np.arange(chunk.end - chunk.start)
            continue
        kept = prefill.survivors(chunk)
        target[first[row] + kept.tokens] = kept.target
        moved.append(_of_row(row, kept.copy_source, kept.copy_target))
    return Moves(*_joined(moved))


def _commits(policy: BatchPolicy, rows: BatchRows) -> tuple[Moves, Moves]:
    spills: list[IntArray] = []
    commits: list[IntArray] = []
    for row, commit in enumerate(rows.commits):
        if commit is not None:
            moves = commit_moves(policy.of_row(row), commit)
            spills.append(_of_row(row, moves.spill_source, moves.spill_target))
            commits.append(_of_row(row, moves.source, moves.target))
    return Moves(*_joined(spills)), Moves(*_joined(commits))


def _of_row(row: int, *columns: IntArray) -> IntArray:
    return np.stack([np.full(len(columns[0]), row), *columns])


def _checkpoints(
    policy: BatchPolicy, rows: BatchRows, first: IntArray, block_size: int
) -> tuple[Saves, IntArray, IntArray, Saves]:
    """Checkpoints of the step: saves before it, tokens and their slots, saves after it.

    A row of one token saves its blocks once the step is done: a CUDA graph writes each token once.
    """
    nothing = np.zeros(0, dtype=np.int64)
    if not any(rows.checkpoints):
        return Saves(nothing, nothing, nothing), nothing, nothing, Saves(nothing, nothing, nothing)
    before: list[IntArray] = []
    after: list[IntArray] = []
    tokens: list[IntArray] = []
    slots: list[IntArray] = []
    for row, planned in enumerate(rows.checkpoints):
        for item in planned:
            chunk = _chunk(policy, rows, row, first)
            own = _own_slots(item.blocks, block_size)
            if chunk.end - chunk.start == 1:
                length = layout.compact_length(chunk.policy, chunk.end, chunk.num_spilled_after)
                entries = np.flatnonzero(own[:length] >= 0)
                after.append(_of_row(row, entries, own[entries]))
                continue
            part = checkpoint.checkpoint_parts(chunk, item.position, block_size, list(item.blocks))
            before.append(_of_row(row, part.copy_source, own[part.copy_target]))
            tokens.append(part.tokens + first[row])
            slots.append(own[part.target])
    return Saves(*_joined(before)), _flat(tokens), _flat(slots), Saves(*_joined(after))


def _own_slots(blocks: dict[int, int], block_size: int) -> IntArray:
    """Slot of each compact index in a checkpoint's own blocks, -1 outside them."""
    slots = np.full((max(blocks) + 1, block_size), -1, dtype=np.int64)
    for index, block_id in blocks.items():
        slots[index] = block_id * block_size + np.arange(block_size)
    return slots.reshape(-1)


def _joined(parts: list[IntArray]) -> IntArray:
    """Columns [3, num] of all rows, one after the other."""
    return np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), dtype=np.int64)


def _flat(parts: list[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
