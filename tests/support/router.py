"""A router: it sees KV events of an engine and knows what each prompt would find there."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
)
from vllm.v1.core.kv_cache_utils import BlockHash, ExternalBlockHash, maybe_convert_block_hash


class Router:
    """What docs/kv-events.md tells a router to do, and beside it one that knows no groups."""

    def __init__(self, block_size: int, group_ids: Sequence[int], ends: int) -> None:
        self.block_size = block_size
        self.group_ids = group_ids  # of SepLLM layers
        self.ends = ends  # the group that says where hits end
        # group -> hash -> what was said of the block
        self.stored: defaultdict[int, dict[ExternalBlockHash, BlockStored]] = defaultdict(dict)
        # of all groups alike
        self.anywhere: set[ExternalBlockHash] = set()

    def take(self, events: Iterable[KVCacheEvent]) -> None:
        for event in events:
            if isinstance(event, BlockStored):
                assert event.group_idx is not None
                assert len(event.token_ids) == event.block_size * len(event.block_hashes)
                self.anywhere.update(event.block_hashes)
                self.stored[event.group_idx].update(dict.fromkeys(event.block_hashes, event))
                is_end = event.group_idx == self.ends
                if is_end or event.group_idx in self.group_ids:
                    assert event.kv_cache_spec_kind == ("mamba" if is_end else "full_attention")
            elif isinstance(event, BlockRemoved):
                assert event.group_idx is not None
                self.anywhere.difference_update(event.block_hashes)
                for block_hash in event.block_hashes:
                    # vLLM's own layers take a hash back once for each block that had it
                    gone = self.stored[event.group_idx].pop(block_hash, None)
                    is_ours = event.group_idx in (*self.group_ids, self.ends)
                    assert gone is not None or not is_ours, "taken back, but never said"
            else:
                assert isinstance(event, AllBlocksCleared)
                self.stored.clear()
                self.anywhere.clear()

    def num_found(self, tokens: list[int], hashes: Sequence[BlockHash], longest: int) -> int:
        """Tokens, at most ``longest``, that a prompt with these hashes finds in SepLLM layers."""
        size, found = self.block_size, 0
        ends = self.stored[self.ends]
        for number, block_hash in enumerate(map(maybe_convert_block_hash, hashes), start=1):
            if any(block_hash not in self.stored[group_id] for group_id in self.group_ids):
                break
            # of the block that ends here, and of shorter ones behind it
            parts = [e for e in ends.values() if e.block_size < size]
            behind = [e.token_ids for e in parts if e.parent_block_hash == block_hash]
            first = number * size
            fitting = [p for p in behind if tokens[first : first + len(p)] == p]
            positions = [first] * (block_hash in ends) + [first + len(p) for p in fitting]
            found = max([found, *(p for p in positions if p <= longest)])
        return found

    def most_found(self, hashes: Sequence[BlockHash]) -> int:
        """Tokens that a router expects which counts blocks and knows no groups."""
        number = 0
        for block_hash in map(maybe_convert_block_hash, hashes):
            if block_hash not in self.anywhere:
                break
            number += 1
        return number * self.block_size
