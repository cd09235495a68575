"""Prefix cache of SepLLM layers: saves a request's compact state, and starts new requests from it.

One object serves all KV cache groups of SepLLM layers: a request advances in lockstep in all of
them, so a checkpoint is its state in each.
"""

from collections.abc import Sequence
from math import lcm

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_sepllm.integration.scheduler.live_requests import LiveRequest, Loading
from vllm_sepllm.integration.scheduler.manager import SepLLMManager
from vllm_sepllm.integration.scheduler.prefix_cache.branch_points import BranchPoints
from vllm_sepllm.integration.scheduler.prefix_cache.checkpoint_registry import CheckpointRegistry
from vllm_sepllm.integration.scheduler.prefix_cache.decode_checkpoints import DecodeCheckpoints
from vllm_sepllm.integration.scheduler.prefix_cache.dense_prefixes import DensePrefixes
from vllm_sepllm.integration.scheduler.prefix_cache.host_checkpoints import HostCheckpoints
from vllm_sepllm.integration.scheduler.prefix_cache.joint_prefills import JointPrefills
from vllm_sepllm.integration.scheduler.prefix_cache.kv_events import HashFunction, KvEvents
from vllm_sepllm.policy.step import checkpoint
from vllm_sepllm.policy.step.plan import HostTransfers, PlannedCheckpoint
from vllm_sepllm.policy.visibility import Policy


class PrefixCache:
    """Dense prefixes (at most a + n tokens) and checkpoints (beyond)."""

    def __init__(
        self,
        managers: Sequence[SepLLMManager],
        engine: Policy,
        checkpoint_interval: int,
        alignment: int,
    ) -> None:
        """Nothing is cached yet.

        Args:
            managers: of all SepLLM groups.
            engine: the policy of requests that choose none.
            checkpoint_interval: tokens between regular checkpoints.
            alignment: hits end at its multiples; 1 where no other kind of layer must agree.
        """
        self._managers = managers
        self._engine = engine
        self._pool = managers[0].block_pool
        self.is_enabled = managers[0].enable_caching
        self._alignment = alignment
        # prefixes end at multiples of it, except checkpoints of requests that end
        self._unit = lcm(alignment, *(m.block_size for m in managers))
        self._interval = checkpoint_interval
        self.registry = CheckpointRegistry(self._pool)
        self._dense = DensePrefixes(managers, self._unit)
        self._branches = BranchPoints()
        self.joint_prefills = JointPrefills(
            self._pool.hash_block_size, self._positions_ahead, self._num_found
        )
        # other layers can hit at block boundaries only, and a request ends between two of them
        self._decoding = (
            DecodeCheckpoints(managers, self.registry, self._unit) if alignment > 1 else None
        )
        self.host: HostCheckpoints | None = None
        # blocks of this step's checkpoints, held so that two of them do not get the same block
        self._fresh: list[KVCacheBlock] = []

    def interval_of(self, policy: Policy) -> int:
        """Distance of the regular checkpoints of requests with ``policy``.

        It grows with a window that is larger than the engine's, as the ring does of which each
        checkpoint holds a copy.
        """
        engine = self._engine.window
        wanted = self._interval * max(policy.window, engine)
        return -(-wanted // (engine * self._unit)) * self._unit

    def announce(self, kv_cache_manager: KVCacheManager, hash_function: HashFunction) -> None:
        """Tell routers from now on what can be found, by vLLM's KV events."""
        KvEvents(kv_cache_manager, self.registry, self._dense, self._num_found, hash_function)

    def offload(self, num_slots: int) -> None:
        """Save in host memory what the pool evicts, as many blocks as that.

        Raises:
            ValueError: if other kinds of layers have blocks that would not come back with ours, or
                if no checkpoint beyond a + n tokens would ever fit.
        """
        if self._alignment > 1:
            raise ValueError(
                "sepllm does not support KV offloading where layers of other kinds must hit with "
                "its own, as vLLM moves their blocks by the tokens in them: remove "
                "--kv-offloading-size"
            )
        smallest = sum(-(-self._engine.num_dense // m.block_size) for m in self._managers)
        if num_slots < smallest:
            raise ValueError(
                f"sepllm's host memory would hold {num_slots} KV blocks, fewer than the {smallest} "
                "of a checkpoint: set a larger --kv-offloading-size, or remove it"
            )
        self.host = HostCheckpoints(self._managers, self.registry, num_slots)

    def take_transfers(self) -> HostTransfers | None:
        """What the step that is scheduled now must move between device and host; None: nothing."""
        return None if self.host is None else self.host.take_transfers()

    # ------------------------------------------------------------------ a new request

    def restore(self, live: LiveRequest, num_kept_free: int) -> Loading | None:
        """Before a request looks its prefix up: bring back what only host memory has of it.

        ``num_kept_free``: blocks that its admission must leave free.
        """
        if self.host is None or live.request.skip_reading_prefix_cache:
            return None
        return self.host.restore(live, self._num_found(live), num_kept_free)

    def must_wait(self, live: LiveRequest) -> bool:
        """Whether a waiting request should start in a later step, from what a prefill leaves."""
        if not live.holding.is_seen:
            self._branches.see(live.request.block_hashes)
            live.holding.is_seen = True
        return not live.request.skip_reading_prefix_cache and self.joint_prefills.must_wait(live)

    def _num_found(self, live: LiveRequest) -> int:
        """Tokens that the request would find now; layers of other kinds may have fewer."""
        _, num_tokens = self.find(live, live.request.num_tokens - 1, ())
        return num_tokens

    def find(
        self, live: LiveRequest, max_length: int, group_ids: Sequence[int]
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix of at most ``max_length`` tokens: its blocks by group, its length."""
        hashes, tokens = live.request.block_hashes, live.request._all_token_ids
        dense = self._dense.find(hashes, min(max_length, live.policy.num_dense))
        found = self.registry.find(hashes, tokens, max_length, self._alignment)
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

    # ------------------------------------------------------------------ a step

    def takes_part(self, live: LiveRequest) -> None:
        """The request takes part in the step that is being scheduled."""
        self.joint_prefills.takes_part(live)
        # proposals that turned out right reach the cache in this step only
        if self._decoding is not None and live.holding.staged is None:
            self._decoding.note(live)

    def plan_copies(self) -> None:
        """All requests of the step are known and no block is changed yet: copy what is kept."""
        for manager in self._managers:
            for block in manager.take_overwritten():
                copy = self._dense.move_away(block)
                if copy is not None:
                    manager.copy_block(block, copy)
        if self._decoding is not None:
            self._decoding.renew()

    def plan_checkpoints(
        self, live: LiveRequest, start: int, end: int
    ) -> tuple[PlannedCheckpoint, ...]:
        """Blocks for the checkpoints that the step [start, end) passes; the step fills them."""
        if not self.is_enabled:
            return ()
        known, policy = min(end, live.request.num_tokens), live.policy
        if end <= policy.num_dense:
            self._key_dense(live, start, known)
            return ()
        # the ring goes over what is behind the initial tokens, never over them
        self._key_dense(live, start, min(known, policy.initial_tokens))
        if end > known:  # an asynchronous step beyond the known tokens
            return ()
        positions = self._positions(live, start, end)
        planned = [self._plan_checkpoint(live, p) for p in positions]
        return tuple(p for p in planned if p is not None)

    def _positions(self, live: LiveRequest, start: int, end: int) -> list[int]:
        """Positions in (start, end] at which the request's step leaves a checkpoint.

        Regularly, at the last block of the prompt, and where prompts part. Beyond a + n tokens
        that is once in n tokens at most, as each checkpoint holds a copy of the ring; up to there
        once, as every block boundary before can be hit, too.
        """
        size, num_dense = self._pool.hash_block_size, live.policy.num_dense
        distance = live.policy.window
        first = start // distance * distance
        numbers = self._branches.between(live.request.block_hashes, first // size, end // size)
        branches = [self._aligned(number * size) for number in numbers]
        wanted = [
            *[p for p in branches if p <= num_dense][-1:],
            *checkpoint.first_of_each((p for p in branches if p > num_dense), distance),
            self._aligned(live.request.num_prompt_tokens - 1),
        ]
        interval = self.interval_of(live.policy)
        return checkpoint.checkpoint_positions(start, end, interval=interval, wanted=wanted)

    def _positions_ahead(self, live: LiveRequest, start: int, end: int) -> list[int]:
        """Positions in (start, end] at which a prefill leaves something that others can hit."""
        policy, longest = live.policy, live.request.num_prompt_tokens
        num_keyed = policy.num_dense if longest <= policy.num_dense else policy.initial_tokens
        dense = self._aligned(min(end, num_keyed))
        return [p for p in (dense, *self._positions(live, start, end)) if p > start]

    def _aligned(self, position: int) -> int:
        """The last position up to there at which a checkpoint may end."""
        return position // self._unit * self._unit

    def take_fresh(self) -> list[KVCacheBlock]:
        """The step is planned: blocks that its checkpoints have to themselves, for it to fill.

        They belong to nobody, so no admission should wait for them: the caller frees them.
        """
        fresh, self._fresh = self._fresh, []
        return fresh

    def _key_dense(self, live: LiveRequest, start: int, end: int) -> None:
        """Give the blocks that are full at ``end`` their keys: none has been overwritten yet.

        An asynchronous step fills a block before its last token is known, so it may be a later
        step that gives the key.
        """
        size, holding = self._pool.hash_block_size, live.holding
        if holding.keyed_until is None:
            holding.keyed_until = start
        start = holding.keyed_until
        if start // size >= end // size:
            return
        holding.keyed_until = end
        for manager in self._managers:
            blocks = manager.req_to_blocks[live.request.request_id]
            for number in range(start // manager.block_size, end // manager.block_size):
                self._dense.add(manager, live.request.block_hashes, number, blocks[number])
        self._dense.added(live, start, end)

    def _plan_checkpoint(self, live: LiveRequest, position: int) -> PlannedCheckpoint | None:
        hashes = live.request.block_hashes
        num_hashes = position // self._pool.hash_block_size
        if not 0 < num_hashes <= len(hashes):
            return None
        block_hash = hashes[num_hashes - 1]
        is_dense = position <= live.policy.num_dense
        if not is_dense and self.registry.has(block_hash, ()):
            return None
        own = [
            self._dense.missing(m, hashes, 0, position) if is_dense else m.to_own(live, position)
            for m in self._managers
        ]
        num_own = sum(len(numbers) for numbers in own)
        if not 0 < num_own <= self._pool.get_num_free_blocks():
            return None
        state, block_ids = {}, {}
        for manager, numbers in zip(self._managers, own, strict=True):
            fresh = dict(zip(numbers, self._pool.get_new_blocks(len(numbers)), strict=True))
            self._fresh.extend(fresh.values())
            group_id = manager.kv_cache_group_id
            block_ids[group_id] = {number: block.block_id for number, block in fresh.items()}
            if not is_dense:
                state[group_id] = manager.state(live, position, fresh)
                continue
            for number, block in fresh.items():
                self._dense.add(manager, hashes, number, block)
        if is_dense:
            self._dense.added(live, 0, position)
        else:
            self.registry.add(live, position, state)
        return PlannedCheckpoint(position, block_ids)

    # ------------------------------------------------------------------ a request that ends

    def keep_final_state(self, live: LiveRequest) -> None:
        """Make the blocks of a request that ends or is preempted a checkpoint."""
        request, staged = live.request, live.holding.staged
        if not self.is_enabled or request.request_id not in self._managers[0].req_to_blocks:
            return
        if live.holding.is_loading:  # aborted, or the transfer has failed
            return
        position = request.num_computed_tokens if staged is None else staged.position
        token_ids = request._all_token_ids
        if position <= live.policy.num_dense:
            # no entry is overwritten yet: what was computed beyond the tokens (drafts that were
            # right but came after the end, a step in flight) lies behind the state
            position = min(position, len(token_ids))
        num_hashes = position // self._pool.hash_block_size
        is_known = 0 < num_hashes <= len(request.block_hashes) and position <= len(token_ids)
        # vLLM's hashes say what is behind a placeholder token, the token itself does not
        if not is_known or request.mm_features or position % self._alignment:
            return
        rest = tuple(token_ids[num_hashes * self._pool.hash_block_size : position])
        block_hash = request.block_hashes[num_hashes - 1]
        if self.registry.has(block_hash, rest):
            return
        state = {m.kv_cache_group_id: m.state(live, position) for m in self._managers}
        self.registry.add(live, position, state)
