"""KV events: what the prefix cache can find, told to routers in vLLM's words (docs/kv-events.md).

A hit ends at a block boundary up to a + n tokens, and at a checkpoint beyond. Events of a SepLLM
group name every block on the way to such an end, as those of full attention do. Events of one group
more, of the kind that states have (Mamba), name the ends themselves. vLLM's rule for a model with
both kinds of layers is the exact answer then: the longest prefix that the first group has without a
gap and the second one ends with.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    generate_block_hash_extra_keys,
    hash_block_tokens,
    maybe_convert_block_hash,
)
from vllm.v1.kv_cache_interface import KVCacheSpecKind
from vllm.v1.request import Request

from vllm_sepllm.integration.scheduler.live_requests import LiveRequest, live_of
from vllm_sepllm.integration.scheduler.prefix_cache.checkpoint_registry import (
    Checkpoint,
    CheckpointRegistry,
)
from vllm_sepllm.integration.scheduler.prefix_cache.dense_prefixes import DensePrefixes
from vllm_sepllm.integration.scheduler.prefix_cache.hash_tree import HashTree
from vllm_sepllm.integration.scheduler.prefix_cache.holders import Holders
from vllm_sepllm.integration.scheduler.prefix_cache.rooted_units import RootedUnits
from vllm_sepllm.integration.scheduler.prefix_cache.watched_pool import watch

HashFunction = Callable[[Any], bytes]


@dataclass(slots=True)
class _End:
    """Where a hit can end.

    Attributes:
        last: hash of its last whole block.
        stored: the event of its last block, whole or not.
        num_reasons: a checkpoint and a dense prefix can end at one place.
    """

    last: BlockHash
    stored: BlockStored
    num_reasons: int = 0


@dataclass(frozen=True, slots=True)
class _Unit:
    """A unit of dense prefixes of which every group has its blocks.

    Attributes:
        parent: the hash before it; None: it begins the text.
        hashes: of its hash blocks.
        stored: their events.
        keys: of its blocks in vLLM's pool.
    """

    parent: BlockHash | None
    hashes: list[BlockHash]
    stored: list[BlockStored]
    keys: list[BlockHashWithGroupId]


class KvEvents:
    """Adds events of SepLLM groups to the queue of vLLM's block pool, as things happen."""

    def __init__(
        self,
        kv_cache_manager: KVCacheManager,
        registry: CheckpointRegistry,
        dense: DensePrefixes,
        num_found: Callable[[LiveRequest], int],
        hash_function: HashFunction,
    ) -> None:
        """Nothing is cached yet.

        Args:
            kv_cache_manager: vLLM's; its events and its pool are ours to change.
            registry: the checkpoints.
            dense: the prefixes of at most a + n tokens.
            num_found: tokens that a request would find in the prefix cache now.
            hash_function: of the block hashes.
        """
        self._dense = dense
        self._num_found = num_found
        self._hash_function = hash_function
        self._pool = pool = kv_cache_manager.block_pool
        self._size = pool.hash_block_size
        self.group_ids = dense.group_ids
        kinds = [*kv_cache_manager.kv_cache_event_metadata]
        for group_id in self.group_ids:
            kinds[group_id] = (KVCacheSpecKind.FULL_ATTENTION.value, None)
        self._ends_group = len(kinds)
        kinds.append((KVCacheSpecKind.MAMBA.value, None))
        kv_cache_manager.kv_cache_event_metadata = tuple(kinds)
        self.clear()
        registry.listeners.append(self._add_checkpoint)
        dense.listeners.append(self._add_dense)
        watch(pool, self.group_ids, self).on_hit = self._report_hit

    def clear(self) -> None:
        """See PoolListener; vLLM says so itself (AllBlocksCleared)."""
        self._tree = HashTree()
        self._ends: dict[BlockHash, _End] = {}
        # checkpoints, each with the name of its end
        self._checkpoints = Holders[BlockHash]()
        # units of dense prefixes by the hash at their end
        self._units: dict[BlockHash, _Unit] = {}
        self._unit_of: dict[BlockHashWithGroupId, BlockHash] = {}
        self._rooted = RootedUnits()

    # ------------------------------------------------------------------ what the cache does

    def lost(self, key: BlockHashWithGroupId) -> None:
        """See PoolListener."""
        name = self._unit_of.get(key)
        if name is not None and not self._dense.has([key]):
            for each in self._rooted.remove(name):
                self._withdraw(each)
            for each_key in self._units.pop(name).keys:
                del self._unit_of[each_key]
        for _, end in self._checkpoints.broken_by(key):
            self._withdraw(end)

    def _report_hit(self, request: Request, group_id: int) -> None:
        """Name the blocks of the prefix that a request finds once more, because it asks for it."""
        number = self._num_found(live_of(request)) // self._size
        if number:
            self._emit(self._event(request, 0, number), [group_id])

    def _add_checkpoint(self, live: LiveRequest, checkpoint: Checkpoint) -> None:
        request, position = live.request, checkpoint.position
        number = position // self._size
        last = request.block_hashes[number - 1]
        if checkpoint.rest:
            stored, name = self._partial(request, position, checkpoint.rest)
        else:
            stored, name = self._event(request, number - 1, number), last
        self._checkpoints.add(checkpoint, name)
        if self._is_new(name, _End(last, stored)):
            known = self._tree.hold(None, request.block_hashes[:number])
            if known < number:
                self._emit(self._event(request, known, number), self.group_ids)
            self._emit(stored, [self._ends_group])

    def _add_dense(self, live: LiveRequest, start: int, end: int) -> None:
        """The full blocks of [start, end) have their keys."""
        rooted: list[BlockHash] = []
        request, hashes, size = live.request, live.request.block_hashes, self._dense.unit
        for first in range(start // size * size, end - size + 1, size):
            numbers = range(first // self._size, (first + size) // self._size)
            name, keys = hashes[numbers[-1]], self._dense.keys(hashes, first, first + size)
            if name in self._units or not self._dense.has(keys):
                continue
            parent = hashes[numbers[0] - 1] if first else None
            own = [hashes[number] for number in numbers]
            stored = [self._event(request, number, number + 1) for number in numbers]
            self._units[name] = _Unit(parent, own, stored, keys)
            self._unit_of.update(dict.fromkeys(keys, name))
            rooted += self._rooted.add(name, parent)
        blocks, ends = [], []
        for name in rooted:
            unit = self._units[name]
            if self._is_new(name, _End(name, unit.stored[-1])):
                known = self._tree.hold(unit.parent, unit.hashes)
                blocks += unit.stored[known:]
                ends.append(unit.stored[-1])
        for event in _joined(blocks):
            self._emit(event, self.group_ids)
        for event in _joined(ends):
            self._emit(event, [self._ends_group])

    # ------------------------------------------------------------------ ends and events

    def _is_new(self, name: BlockHash, end: _End) -> bool:
        """Count one more reason for a hit to end there; whether it is the first."""
        known = self._ends.setdefault(name, end)
        known.num_reasons += 1
        return known is end

    def _withdraw(self, name: BlockHash) -> None:
        """One reason less for a hit to end there."""
        end = self._ends[name]
        end.num_reasons -= 1
        if end.num_reasons:
            return
        del self._ends[name]
        self._remove([name], self._ends_group)
        gone = self._tree.release(end.last)
        for group_id in self.group_ids if gone else ():
            self._remove(gone, group_id)
        if not gone and name == end.last:
            # a router that knows no groups has just dropped the block
            self._emit(end.stored, self.group_ids)

    def _emit(self, event: BlockStored, group_ids: Iterable[int]) -> None:
        for group_id in group_ids:
            told = copy(event)
            told.group_idx = group_id
            self._pool.kv_event_queue.append(told)

    def _remove(self, hashes: Sequence[BlockHash], group_id: int) -> None:
        names = [maybe_convert_block_hash(block_hash) for block_hash in hashes]
        event = BlockRemoved(block_hashes=names, medium=self._pool.medium, group_idx=group_id)
        self._pool.kv_event_queue.append(event)

    def _event(self, request: Request, first: int, last: int) -> BlockStored:
        """The event of the request's hash blocks [first, last)."""
        hashes, size = request.block_hashes[first:last], self._size
        return self._built(request, hashes, first, range(first * size, last * size, size), size)

    def _partial(
        self, request: Request, position: int, rest: tuple[int, ...]
    ) -> tuple[BlockStored, BlockHash]:
        """The event of the tokens behind the last whole block, hashed as if they were one."""
        number, start = position // self._size, position - len(rest)
        extra_keys, _ = generate_block_hash_extra_keys(request, start, position, 0)
        name = hash_block_tokens(
            self._hash_function, request.block_hashes[number - 1], rest, extra_keys
        )
        blocks = range(start, position, len(rest))
        return self._built(request, [name], number, blocks, len(rest)), name

    def _built(
        self, request: Request, hashes: Sequence[BlockHash], number: int, starts: range, size: int
    ) -> BlockStored:
        """An event as vLLM builds it, of blocks of ``size`` tokens; the first has that number."""
        extra_keys = [generate_block_hash_extra_keys(request, i, i + size, 0)[0] for i in starts]
        parent = request.block_hashes[number - 1] if number else None
        # since vLLM 0.33; scheduler.py makes sure that no hash covers tokens behind its block
        is_told = hasattr(self._pool, "num_hash_lookahead_tokens")
        ahead: dict[str, Any] = {"lookahead_token_ids": None} if is_told else {}
        event: BlockStored = self._pool._build_block_stored_event(
            request,
            block_hashes=[maybe_convert_block_hash(block_hash) for block_hash in hashes],
            parent_block_hash=None if parent is None else maybe_convert_block_hash(parent),
            start_token_idx=starts.start,
            end_token_idx=starts.stop,
            block_size=size,
            kv_cache_group_id=self._ends_group,
            extra_keys_list=extra_keys,
            **ahead,
        )
        return event


def _joined(events: Iterable[BlockStored]) -> list[BlockStored]:
    """The same blocks in fewer events, where one begins behind another."""
    joined: list[BlockStored] = []
    for event in events:
        last = joined[-1] if joined else None
        if last is not None and last.block_hashes[-1] == event.parent_block_hash:
            last = joined[-1] = copy(last)
            last.block_hashes = last.block_hashes + event.block_hashes
            last.token_ids = last.token_ids + event.token_ids
            last.extra_keys = (last.extra_keys or []) + (event.extra_keys or [])
        else:
            joined.append(event)
    return joined
