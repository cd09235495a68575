"""What of a request's cache is kept for others, and what of it a new request starts from.

One object serves all KV cache groups of SepLLM layers: a request advances in lockstep in all of
them, so a checkpoint is its state in each.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import lcm
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from vllm_sepllm.integration.scheduler.prefix_cache.checkpoint_registry import (
    CheckpointRegistry,
)
from vllm_sepllm.integration.scheduler.prefix_cache.decode_checkpoints import (
    StandingCheckpoints,
)
from vllm_sepllm.integration.scheduler.prefix_cache.dense_prefixes import DensePrefixes
from vllm_sepllm.integration.scheduler.usage import KvUsage
from vllm_sepllm.policy.step import checkpoint
from vllm_sepllm.policy.step.plan import PlannedCheckpoint
from vllm_sepllm.policy.visibility import Policy

if TYPE_CHECKING:
    from vllm_sepllm.integration.scheduler.live_requests import RequestSeparators
    from vllm_sepllm.integration.scheduler.manager import SepLLMManager


class PrefixCache:
    """Dense prefixes (at most a + n tokens) and checkpoints (beyond)."""

    def __init__(
        self,
        managers: Sequence["SepLLMManager"],
        separators: "RequestSeparators",
        checkpoint_interval: int,
        alignment: int,
    ) -> None:
        """``alignment``: hits end at multiples of it; 1 where no other layers must agree."""
        self._managers = managers
        self._separators = separators
        self._pool = managers[0].block_pool
        self._is_enabled = managers[0].enable_caching
        self._alignment = alignment
        # checkpoints end at multiples of it, except those of requests that end
        self._unit = lcm(alignment, *(m.block_size for m in managers))
        self._interval = checkpoint_interval
        self._registry = CheckpointRegistry(self._pool)
        self._dense = DensePrefixes(managers, alignment)
        # a request that ends does so between two of the positions that other layers can hit
        self._standing = (
            StandingCheckpoints(managers, self._registry, self._unit) if alignment > 1 else None
        )
        self._looked_up: tuple[Request, list[BlockHash]] | None = None
        # request -> positions at which its prefill leaves a checkpoint
        self._wanted: dict[str, tuple[int, ...]] = {}
        # request -> tokens up to which its full blocks have their keys, if any has
        self._kept_until: dict[str, int] = {}
        # blocks of this step's checkpoints, held so that two of them do not get the same block
        self._fresh: list[KVCacheBlock] = []

    def interval_of(self, policy: Policy) -> int:
        """Distance of the regular checkpoints of requests with ``policy``.

        It grows with a window that is larger than the engine's, as the ring does of which each
        checkpoint holds a copy.
        """
        engine = self._separators.policy.num_dense
        wanted = self._interval * max(policy.num_dense, engine)
        return -(-wanted // (engine * self._unit)) * self._unit

    def watch(self, max_model_len: int) -> KvUsage:
        """Follow what requests and checkpoints hold from now on."""
        named_blocks = self._registry.named_blocks
        return KvUsage(self._managers, self._separators, named_blocks, max_model_len)

    # ------------------------------------------------------------------ a new request

    @contextmanager
    def looking_up(self, request: Request) -> Iterator[None]:
        """Say whose prefix vLLM is about to look for: it passes hashes of whole blocks only."""
        if not self._is_enabled:
            yield
            return
        hashes = self._separators.salted(request)
        self._want_checkpoints(request, hashes)
        self._looked_up = (request, hashes)
        try:
            yield
        finally:
            self._looked_up = None

    def find(
        self, max_length: int, group_ids: Sequence[int]
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix of at most ``max_length`` tokens: its blocks by group, its length."""
        assert self._looked_up is not None, "the scheduler says whose prefix is looked up"
        request, hashes = self._looked_up
        num_dense = self._separators.policy_of(request.request_id).num_dense
        dense = self._dense.find(hashes, min(max_length, num_dense))
        tokens = request._all_token_ids
        found = self._registry.find(hashes, tokens, max_length, self._alignment)
        if found is not None and found.position > dense:
            return tuple(found.group(i) for i in group_ids), found.position
        managers = [m for m in self._managers if m.kv_cache_group_id in group_ids]
        return tuple(self._dense.blocks(m, hashes, dense) for m in managers), dense

    def fits(
        self, kv_cache_manager: KVCacheManager, request: Request, hit: KVCacheBlocks, length: int
    ) -> bool:
        """Whether a hit of ``length`` tokens leaves enough free blocks for the whole request.

        Its copies make a hit dearer than a miss: in a full pool it must not keep anyone out.
        """
        needed = kv_cache_manager.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=request.num_tokens,
            new_computed_blocks=hit.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=length,
            num_local_computed_tokens=length,
            num_tokens_main_model=request.num_tokens,
            apply_admission_cap=True,
        )
        free = self._pool.get_num_free_blocks()
        return needed + kv_cache_manager.watermark_blocks <= free

    def _want_checkpoints(self, request: Request, hashes: Sequence[BlockHash]) -> None:
        """Where requests like this one begin alike, and the last block of its prompt.

        A request that has to wait is looked up again and again, but compared with others once.
        """
        if request.request_id in self._wanted:
            return
        positions = self._registry.common_prefix(hashes), request.num_prompt_tokens - 1
        self._wanted[request.request_id] = tuple(p // self._unit * self._unit for p in positions)

    # ------------------------------------------------------------------ a step

    def note_step(self, request: Request) -> None:
        """The request takes part in the step that is being scheduled."""
        # proposals that turned out right reach the cache in this step only
        is_settled = request.request_id not in self._separators.staged
        if self._standing is not None and is_settled:
            policy = self._separators.policy_of(request.request_id)
            self._standing.note(request, policy.num_dense)

    def plan_copies(self) -> None:
        """All requests of the step are known and no block is changed yet: copy what is kept."""
        for manager in self._managers:
            for block in manager.take_overwritten():
                copy = self._dense.move_away(manager, block)
                if copy is not None:
                    manager.copy_block(block, copy)
        if self._standing is not None:
            self._standing.renew(self._separators)

    def plan_checkpoints(
        self, request: Request, start: int, end: int
    ) -> tuple[PlannedCheckpoint, ...]:
        """Blocks for the checkpoints that the step [start, end) passes; the step fills them."""
        if not self._is_enabled:
            return ()
        known = min(end, request.num_tokens)
        policy = self._separators.policy_of(request.request_id)
        if end <= policy.num_dense:
            self._keep_dense(request, start, known)
            return ()
        if end > known:  # an asynchronous step beyond the known tokens
            return ()
        wanted = self._wanted.get(request.request_id, ())
        positions = checkpoint.checkpoint_positions(
            start, end, interval=self.interval_of(policy), wanted=wanted
        )
        if not positions:
            return ()
        hashes = self._separators.salted(request)
        planned = [self._plan_checkpoint(request, hashes, p) for p in positions]
        return tuple(p for p in planned if p is not None)

    def release_checkpoints(self) -> None:
        """The step is planned: its checkpoints belong to nobody, so no admission waits for them."""
        self._pool.free_blocks(self._fresh)
        self._fresh = []

    def _keep_dense(self, request: Request, start: int, end: int) -> None:
        """Give the blocks that are full at ``end`` their keys: nothing has been overwritten yet.

        An asynchronous step fills a block before its last token is known, so it may be a later
        step that gives the key.
        """
        size = self._pool.hash_block_size
        start = self._kept_until.setdefault(request.request_id, start)
        if start // size == end // size:
            return
        self._kept_until[request.request_id] = end
        hashes = self._separators.salted(request)
        for manager in self._managers:
            blocks = manager.req_to_blocks[request.request_id]
            for number in range(start // manager.block_size, end // manager.block_size):
                self._dense.add(manager, hashes, number, blocks[number])

    def _plan_checkpoint(
        self, request: Request, hashes: Sequence[BlockHash], position: int
    ) -> PlannedCheckpoint | None:
        num_hashes = position // self._pool.hash_block_size
        if not 0 < num_hashes <= len(hashes):
            return None
        block_hash = hashes[num_hashes - 1]
        is_dense = position <= self._separators.policy_of(request.request_id).num_dense
        if not is_dense and self._registry.has(block_hash, ()):
            return None
        own = [
            self._dense.missing(m, hashes, 0, position)
            if is_dense
            else m.written_blocks(request.request_id, position)
            for m in self._managers
        ]
        num_own = sum(len(numbers) for numbers in own)
        if not 0 < num_own <= self._pool.get_num_free_blocks():
            return None
        fresh = []
        for manager, numbers in zip(self._managers, own, strict=True):
            blocks = self._pool.get_new_blocks(len(numbers))
            self._fresh.extend(blocks)
            fresh.append(dict(zip(numbers, blocks, strict=True)))
            for number, block in fresh[-1].items() if is_dense else ():
                self._dense.add(manager, hashes, number, block)
        if not is_dense:
            state = {
                m.kv_cache_group_id: m.state(request.request_id, position, blocks)
                for m, blocks in zip(self._managers, fresh, strict=True)
            }
            self._registry.add(block_hash, position, (), state)
        return PlannedCheckpoint(
            position,
            {
                m.kv_cache_group_id: {i: block.block_id for i, block in blocks.items()}
                for m, blocks in zip(self._managers, fresh, strict=True)
            },
        )

    # ------------------------------------------------------------------ a request that ends

    def request_leaves(self, request_id: str) -> None:
        """Keep the state of a request that ends or is preempted: its blocks are a checkpoint."""
        if self._is_enabled and request_id in self._managers[0].req_to_blocks:
            self._keep_final_state(self._separators.request(request_id))
        self._wanted.pop(request_id, None)
        self._kept_until.pop(request_id, None)
        if self._standing is not None:
            self._standing.forget(request_id)

    def _keep_final_state(self, request: Request) -> None:
        staged = self._separators.staged.get(request.request_id)
        position = request.num_computed_tokens if staged is None else staged.position
        num_hashes = position // self._pool.hash_block_size
        token_ids = request._all_token_ids
        is_known = 0 < num_hashes <= len(request.block_hashes) and position <= len(token_ids)
        # vLLM's hashes say what is behind a placeholder token, the token itself does not
        if not is_known or request.mm_features or position % self._alignment:
            return
        rest = tuple(token_ids[num_hashes * self._pool.hash_block_size : position])
        block_hash = self._separators.salted(request)[num_hashes - 1]
        if self._registry.has(block_hash, rest):
            return
        state = {m.kv_cache_group_id: m.state(request.request_id, position) for m in self._managers}
        self._registry.add(block_hash, position, rest, state)
