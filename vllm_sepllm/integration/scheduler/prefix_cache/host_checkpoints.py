"""Checkpoints in host memory: what the pool evicts goes there, least recently used goes first.

vLLM's connectors for offloading know blocks by the hash of their tokens. A compact block has none:
its entries are part of the state after a prefix, and only all blocks of a checkpoint together mean
something. So host memory is a second level below the pool: an evicted checkpoint is saved as a
whole, and before a request looks its prefix up it is put back into the pool, where vLLM finds it
like any other.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import lcm

from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock

from vllm_sepllm.integration.scheduler.live_requests import LiveRequest, Loading
from vllm_sepllm.integration.scheduler.manager import SepLLMManager
from vllm_sepllm.integration.scheduler.prefix_cache.checkpoint_registry import (
    Checkpoint,
    CheckpointRegistry,
)
from vllm_sepllm.integration.scheduler.prefix_cache.holders import Holders
from vllm_sepllm.integration.scheduler.prefix_cache.watched_pool import watch
from vllm_sepllm.policy.step.plan import HostTransfers


@dataclass(frozen=True, slots=True)
class _Source:
    """What a checkpoint in the pool will be found by in host memory.

    Attributes:
        block_hash: of its last whole hash block.
        dense: positions of block boundaries -> hashes there, if it has at most a + n tokens: each
            of its beginnings is the state there.
        window: of its request; the metrics tell slots apart by it.
    """

    block_hash: BlockHash
    dense: dict[int, BlockHash]
    window: int


@dataclass(frozen=True, slots=True, eq=False)
class _Saved:
    """A checkpoint in host memory; ``slots``: KV cache group -> host slots, in compact order."""

    position: int
    rest: tuple[int, ...]
    source: _Source
    slots: dict[int, tuple[int, ...]]

    @property
    def hashes(self) -> set[BlockHash]:
        """Under which it is found."""
        return {self.source.block_hash, *self.source.dense.values()}

    @property
    def all_slots(self) -> set[int]:
        """Of all groups."""
        return {slot for group in self.slots.values() for slot in group}


class HostCheckpoints:
    """Decides which blocks a step moves between device and host, before all else that it does.

    Attributes:
        windows: host slot -> window of the checkpoint that was saved there last.
    """

    def __init__(
        self, managers: Sequence[SepLLMManager], registry: CheckpointRegistry, num_slots: int
    ) -> None:
        """Nothing is saved yet.

        Args:
            managers: of all KV cache groups, which are all of SepLLM layers.
            registry: the checkpoints in the pool.
            num_slots: blocks of host memory.
        """
        self._managers = managers
        self._registry = registry
        self._hash_size = managers[0].block_pool.hash_block_size
        self._num_slots = num_slots
        group_ids = [manager.kv_cache_group_id for manager in managers]
        self._pool = watch(managers[0].block_pool, group_ids, self)
        registry.listeners.append(self._added)
        self.clear()

    def clear(self) -> None:
        """See PoolListener: what is saved may be of other weights."""
        self._sources = Holders[_Source]()
        # least recently used first
        self._saved: OrderedDict[tuple[BlockHash, tuple[int, ...]], _Saved] = OrderedDict()
        self._by_hash: dict[BlockHash, dict[_Saved, None]] = {}
        self._free = list(range(self._num_slots))
        self._free_later: list[int] = []
        # saved checkpoints that need a slot, and the keys under which its content is known
        self._num_users: Counter[int] = Counter()
        self._slot_of: dict[BlockHashWithGroupId, int] = {}
        self._keys: dict[int, set[BlockHashWithGroupId]] = {}
        self.windows: dict[int, int] = {}
        # window -> slots that hold checkpoints
        self._num_held: Counter[int] = Counter()
        # of the step that is being scheduled: host slot -> block, block -> host slot
        self._saves: dict[int, int] = {}
        self._loads: dict[int, int] = {}

    # ------------------------------------------------------------------ the pool evicts

    def _added(self, live: LiveRequest, checkpoint: Checkpoint) -> None:
        hashes, size = live.request.block_hashes, self._hash_size
        last = checkpoint.position // size
        dense = {}
        if checkpoint.position <= live.policy.num_dense:
            # every group must have a whole number of blocks
            unit = lcm(*(manager.block_size for manager in self._managers)) // size
            dense = {n * size: hashes[n - 1] for n in range(unit, last + 1, unit)}
        self._sources.add(checkpoint, _Source(hashes[last - 1], dense, live.policy.window))

    def lost(self, key: BlockHashWithGroupId) -> None:
        """See PoolListener: the other blocks of a checkpoint are still as they were."""
        for checkpoint, source in self._sources.broken_by(key):
            self._save(checkpoint, source)
        # a new block may get the key of a dense prefix again; it is saved once more then
        slot = self._slot_of.pop(key, None)
        if slot is not None:
            self._keys[slot].discard(key)

    def _save(self, checkpoint: Checkpoint, source: _Source) -> None:
        name = source.block_hash, checkpoint.rest
        if name in self._saved:
            self._saved.move_to_end(name)
            return
        blocks = {key: block for group in checkpoint.blocks.values() for block, key in group}
        new = [key for key in blocks if key not in self._slot_of]
        # what was handed out in this step gets its content in it, after the saves
        handed_out = self._pool.handed_out
        if any(blocks[key].block_id in handed_out for key in new) or len(new) > self._num_slots:
            return
        known = {self._slot_of[key] for key in blocks if key in self._slot_of}
        self._num_users.update(known)
        self._make_room(len(new))
        if len(new) > len(self._free):
            self._release(known)
            return
        for key in new:
            slot = self._free.pop()
            self._name(slot, key)
            self._num_users[slot] += 1
            self._saves[slot] = blocks[key].block_id
            self.windows[slot] = source.window
        self._num_held[source.window] += len(new)
        slots = {
            group_id: tuple(self._slot_of[key] for _, key in group)
            for group_id, group in checkpoint.blocks.items()
        }
        saved = _Saved(checkpoint.position, checkpoint.rest, source, slots)
        self._saved[name] = saved
        for block_hash in saved.hashes:
            self._by_hash.setdefault(block_hash, {})[saved] = None

    def _make_room(self, num_slots: int) -> None:
        while len(self._free) < num_slots and self._saved:
            _, saved = self._saved.popitem(last=False)
            for block_hash in saved.hashes:
                del self._by_hash[block_hash][saved]
                if not self._by_hash[block_hash]:
                    del self._by_hash[block_hash]
            self._release(saved.all_slots)

    def _name(self, slot: int, key: BlockHashWithGroupId) -> None:
        """What the slot holds is known by this key, too."""
        self._slot_of[key] = slot
        self._keys.setdefault(slot, set()).add(key)

    def _release(self, slots: Iterable[int]) -> None:
        """One user less of each slot."""
        loaded = set(self._loads.values())
        for slot in slots:
            self._num_users[slot] -= 1
            if self._num_users[slot]:
                continue
            del self._num_users[slot]
            self._num_held[self.windows[slot]] -= 1
            for key in self._keys.pop(slot, ()):
                del self._slot_of[key]
            # a save of this step would overwrite what the step loads
            (self._free_later if slot in loaded else self._free).append(slot)

    # ------------------------------------------------------------------ a request comes

    def find(
        self, hashes: Sequence[BlockHash], token_ids: Sequence[int], max_length: int
    ) -> tuple[_Saved, int] | None:
        """The saved checkpoint of the longest prefix of at most ``max_length`` tokens, and that.

        The prefix may be a beginning of the checkpoint's, up to a + n tokens.
        """
        size = self._hash_size
        for number in range(min(max_length // size, len(hashes)), 0, -1):
            block_hash, first = hashes[number - 1], number * size
            found = []
            for saved in self._by_hash.get(block_hash, ()):
                end = saved.position
                rest = tuple(token_ids[first:end])
                if saved.source.block_hash == block_hash and saved.rest == rest:
                    found.append((saved, end))
                if first in saved.source.dense:
                    found.append((saved, first))
            found = [(saved, end) for saved, end in found if end <= max_length]
            if found:
                return max(found, key=lambda each: each[1])
        return None

    def restore(self, live: LiveRequest, num_found: int, num_kept_free: int) -> Loading | None:
        """Put the longest saved prefix of a request back into the pool, where it can be found.

        The pool must have room for it and for the request: otherwise one would push the other out.
        Nothing is held: its blocks are free and have keys, like all that nobody uses.

        Args:
            live: the request, which waits.
            num_found: tokens that it would find in the pool without.
            num_kept_free: blocks that its admission must leave free (vLLM's watermark); without
                them it could not start from what was loaded.

        Returns:
            What is loaded; None: nothing.
        """
        request = live.request
        found = self.find(request.block_hashes, request._all_token_ids, request.num_tokens - 1)
        if found is None or found[1] <= num_found:
            return None
        saved, position = found
        slots = {
            m.kv_cache_group_id: saved.slots[m.kv_cache_group_id][: m.num_blocks(live, position)]
            for m in self._managers
        }
        num_blocks = sum(len(group) for group in slots.values())
        most = sum(m.num_blocks_to_hold(live, request.num_tokens) for m in self._managers)
        if num_blocks + most + num_kept_free > self._pool.get_num_free_blocks():
            return None
        self._saved.move_to_end((saved.source.block_hash, saved.rest))
        held = saved.all_slots
        self._num_users.update(held)  # the pool may evict, and what it evicts needs slots
        blocks = iter(self._pool.get_new_blocks(num_blocks))
        state: dict[int, list[KVCacheBlock]] = {}
        for group_id, group in slots.items():
            state[group_id] = [next(blocks) for _ in group]
            self._loads.update(
                (block.block_id, slot) for block, slot in zip(state[group_id], group, strict=True)
            )
        self._release(held)
        checkpoint = self._registry.add(live, position, state)
        for group_id, group in slots.items():
            for slot, (_, key) in zip(group, checkpoint.blocks[group_id], strict=True):
                if slot in self._num_users:
                    self._name(slot, key)
        self._pool.free_blocks([block for group in state.values() for block in group])
        return Loading(position, [len(group) for group in slots.values()])

    def usage(self) -> dict[int, float]:
        """Window -> part of host memory that its checkpoints hold; windows that held any stay."""
        return {window: number / self._num_slots for window, number in self._num_held.items()}

    def take_transfers(self) -> HostTransfers | None:
        """What the step that is scheduled now must move; None: nothing."""
        saves, self._saves = self._saves, {}
        loads, self._loads = self._loads, {}
        self._free += self._free_later
        self._free_later.clear()
        self._pool.handed_out.clear()
        return HostTransfers(saves, loads) if saves or loads else None
