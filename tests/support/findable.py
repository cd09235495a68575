"""What the prefix cache may find is what its name says, whether or not a request looks for it.

Few prompts begin alike, and a small pool soon forgets: most of what is wrong in a cache is never
read.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId

from tests.support.labelled_worker import Label, LabelledWorker
from vllm_sepllm.integration.scheduler.live_requests import LiveRequest
from vllm_sepllm.integration.scheduler.prefix_cache.checkpoint_registry import Checkpoint


class Findable:
    """Notes what a scheduler gives names to, and compares it with what its worker has."""

    def __init__(self, scheduler: Any, worker: LabelledWorker) -> None:
        self._cache, self._worker = scheduler._prefix_cache, worker
        self._pool = scheduler.kv_cache_manager.block_pool
        self._dense: dict[BlockHashWithGroupId, set[Label]] = {}
        self._checkpoints: list[tuple[Checkpoint, set[Label]]] = []
        # the same, by what they are found by in host memory
        self._saved: dict[tuple[BlockHash, tuple[int, ...]], set[Label]] = {}
        # functions: leftovers.py looks at what objects refer to, and all of this is the test's
        self._cache.registry.listeners.append(lambda *news: self._checkpoint_added(*news))
        self._cache._dense.listeners.append(lambda *news: self._dense_added(*news))

    def _checkpoint_added(self, live: LiveRequest, checkpoint: Checkpoint) -> None:
        request, position = live.request, checkpoint.position
        text = self._worker.text(request.request_id, request._all_token_ids[:position])
        # after a token the cache holds what the token reads
        wanted = {*text.wanted(position - 1)}
        last = request.block_hashes[position // self._pool.hash_block_size - 1]
        self._checkpoints.append((checkpoint, wanted))
        self._saved[last, checkpoint.rest] = wanted

    def _dense_added(self, live: LiveRequest, start: int, end: int) -> None:
        request, size = live.request, self._worker.block_size
        text = self._worker.text(request.request_id, request._all_token_ids[:end])
        for first in range(start // size * size, end // size * size, size):
            wanted = {text.label(i, i) for i in range(first, first + size)}
            keys = self._cache._dense.keys(request.block_hashes, first, first + size)
            self._dense.update(dict.fromkeys(keys, wanted))

    def check_moved(self, keys: Iterable[BlockHashWithGroupId]) -> None:
        """Blocks lost these keys though the pool did not need them: others have them now."""
        find = self._pool.cached_block_hash_to_block.get_one_block
        for key in keys:
            assert key not in self._dense or find(key) is not None, "a cached block is forgotten"

    def check(self) -> None:
        """The worker has done every step that was scheduled."""
        for block in self._pool.blocks:
            if block.block_hash in self._dense:
                wanted = self._dense[block.block_hash]
                assert self._in_pool([block.block_id], wanted) == wanted, "a cached block is wrong"
        self._checkpoints = [(one, wanted) for one, wanted in self._checkpoints if one.is_whole]
        for checkpoint, wanted in self._checkpoints:
            for group_id in checkpoint.blocks:
                blocks = [block.block_id for block in checkpoint.group(group_id)]
                assert self._in_pool(blocks, wanted) == wanted, "a checkpoint is wrong"
        for name, saved in self._cache.host._saved.items() if self._cache.host else ():
            for slots in saved.slots.values():
                found = chain.from_iterable(self._worker.host[slot] for slot in slots)
                assert _first(found, self._saved[name]) == self._saved[name], "host memory is wrong"

    def _in_pool(self, blocks: list[int], wanted: set[Label]) -> set[Label | None]:
        memory, size = self._worker.memory, self._worker.block_size
        return _first((memory.get(b * size + i) for b in blocks for i in range(size)), wanted)


def _first(labels: Iterable[Label | None], wanted: set[Label]) -> set[Label | None]:
    """As many as are wanted: entries behind them are not of the state."""
    return {label for label, _ in zip(labels, wanted, strict=False)}
