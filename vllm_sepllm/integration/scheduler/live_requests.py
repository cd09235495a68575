"""What the plugin knows of each request that vLLM's scheduler has: one object, one dictionary."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock
from vllm.v1.request import Request

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.epochs import Epochs
from vllm_sepllm.policy.separators.definition import Separators
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.step.decode_table import DecodeTable
from vllm_sepllm.policy.step.epoch_table import EpochTable
from vllm_sepllm.policy.step.staging import Staged
from vllm_sepllm.policy.visibility import BatchPolicy, IntArray, Policy

KeyedBlock = tuple[KVCacheBlock, BlockHashWithGroupId]


@dataclass(slots=True)
class GroupState:
    """What a request holds in one KV cache group, besides vLLM's own block table.

    Attributes:
        to_copy: block indices of its prefix-cache hit that it must own; copied in its first step.
        sources: keys of the blocks that it has copies of (SharedSources).
        overwritten: blocks that the prefix cache can find and that its ring overwrites in the step
            that is being scheduled, with the keys they had.
        first_tokens: lowest number of tokens that takes ``num_blocks`` blocks, as far as known.
        last_tokens: highest such number; below ``first_tokens``: nothing is known.
        num_blocks: blocks that these numbers of tokens take.
    """

    to_copy: list[int] = field(default_factory=list)
    sources: list[BlockHashWithGroupId] = field(default_factory=list)
    overwritten: list[KeyedBlock] = field(default_factory=list)
    first_tokens: int = 0
    last_tokens: int = -1
    num_blocks: int = 0


class Awaited(NamedTuple):
    """A checkpoint that a running prefill is about to leave.

    Attributes:
        number: of the running request.
        position: tokens of the checkpoint.
    """

    number: int
    position: int


class Loading(NamedTuple):
    """A state that comes from another instance or from host memory.

    Attributes:
        num_tokens: of the prompt, which it stands for.
        num_blocks: that are read, of each KV cache group.
    """

    num_tokens: int
    num_blocks: list[int]


@dataclass(slots=True)
class Holding:
    """What is known of a request until it loses its blocks: by its end, or by preemption.

    Attributes:
        groups: KV cache group -> what it holds there.
        staged: what its last step proposed, until its next step (policy/step/staging.py).
        is_seen: whether its prompt was compared with others (BranchPoints).
        awaited: the checkpoint that it waits for, to start from it (JointPrefills).
        keyed_until: tokens up to which its full blocks have their keys; None: none has.
        next_look: number of tokens from which on its tail may nearly be a ring (SharedTails); None:
            it did not take part in a step yet.
        last_copies: blocks of its last checkpoint while it decodes, with the keys they had
            (DecodeCheckpoints).
        num_counted: spilled separators that the metrics have counted, or that its hit came with.
        is_loading: its blocks wait for a state that another instance has computed.
        loading: what is read of that state, once that is known.
    """

    groups: defaultdict[int, GroupState] = field(default_factory=lambda: defaultdict(GroupState))
    staged: Staged | None = None
    is_seen: bool = False
    awaited: Awaited | None = None
    keyed_until: int | None = None
    next_look: int | None = None
    last_copies: list[KeyedBlock] = field(default_factory=list)
    num_counted: int = 0
    is_loading: bool = False
    loading: Loading | None = None


@dataclass(slots=True)
class LiveRequest:
    """A request of the scheduler.

    Attributes:
        request: vLLM's.
        number: unique among all requests that ever arrived.
        index: its separators, and its policy.
        slot: its row in the table of decode steps.
        epochs: of its positions, if they are renumbered; None: they are those in the text.
        refusal: why it ends with an error instead of being scheduled; None: it is served.
        ignores_state: the state that another instance holds for it does not fit.
        holding: what it holds now.
    """

    request: Request
    number: int
    index: SeparatorIndex
    slot: int
    epochs: Epochs | None = None
    refusal: str | None = None
    ignores_state: bool = False
    holding: Holding = field(default_factory=Holding)

    @property
    def policy(self) -> Policy:
        """The request's own policy."""
        return self.index.policy

    @property
    def stays_dense(self) -> bool:
        """Whether it ends within a + n tokens, so that its ring never goes round."""
        request = self.request
        longest = request.num_prompt_tokens + request.max_tokens
        return longest <= self.policy.num_dense and not request.resumable

    @property
    def reads_state(self) -> bool:
        """Whether it is about to start from a state that another instance holds for it."""
        request, given = self.request, self.request.kv_transfer_params or {}
        is_held = bool(given.get("do_remote_prefill")) and not request.skip_reading_prefix_cache
        return is_held and not self.ignores_state

    @property
    def may_renumber(self) -> bool:
        """Whether it may reach the end of an epoch, where all its keys are turned."""
        request, end = self.request, self.policy.max_position
        if end is None:
            return False
        return request.num_prompt_tokens + request.max_tokens > end or bool(request.resumable)

    def begins_epoch(self, position: int) -> bool:
        """Whether an epoch other than the first begins with the token at ``position``."""
        if self.epochs is None or position == 0:
            return False
        return self.epochs.at(position, self.request._all_token_ids).start == position

    def count_below(self, position: int) -> int:
        """Separators at positions in [initial_tokens, position)."""
        self.index.extend(self.request._all_token_ids, position)
        return self.index.count_below(position)

    def num_spilled(self, num_tokens: int) -> int:
        """Separators that have left the window after ``num_tokens`` tokens."""
        return self.count_below(layout.num_left_window(self.policy, num_tokens))

    def compact_length(self, num_tokens: int) -> int:
        """Entries of the cache after ``num_tokens`` tokens."""
        return layout.compact_length(self.policy, num_tokens, self.num_spilled(num_tokens))


class RequestHashes(list[BlockHash]):
    """The block hashes of a request, with the request.

    vLLM gives a manager nothing else to look a prefix up by, and a checkpoint is also compared with
    the request's tokens after its last whole block.
    """

    def __init__(self, hashes: Iterable[BlockHash], live: LiveRequest) -> None:
        super().__init__(hashes)
        self.live = live


def live_of(request: Request) -> LiveRequest:
    """What is known of a request, where vLLM hands over nothing but the request."""
    assert isinstance(request.block_hashes, RequestHashes), "LiveRequests.add replaces the hashes"
    return request.block_hashes.live


@dataclass(frozen=True, slots=True)
class Batch:
    """The requests of a step, kept as long as none comes, goes or is truncated.

    Attributes:
        ids: [num_rows] request ids.
        rows: request id -> row.
        live: [num_rows].
        requests: [num_rows], vLLM's: their progress is read in every step.
        slots: [num_rows], in the table of decode steps.
        policy: of the rows.
    """

    ids: list[str]
    rows: dict[str, int]
    live: list[LiveRequest]
    requests: list[Request]
    slots: IntArray
    policy: BatchPolicy

    @classmethod
    def of(cls, live: list[LiveRequest], engine: Policy) -> "Batch":
        """The batch of these requests, in this order; ``engine`` is the engine's policy."""
        ids = [one.request.request_id for one in live]
        return cls(
            ids=ids,
            rows={request_id: row for row, request_id in enumerate(ids)},
            live=live,
            requests=[one.request for one in live],
            slots=np.array([one.slot for one in live], dtype=np.int64),
            policy=BatchPolicy.of([one.policy for one in live], engine),
        )


class LiveRequests(dict[str, LiveRequest]):
    """Request id -> :class:`LiveRequest`, from arrival to end."""

    def __init__(self, separators: Separators, engine: Policy) -> None:
        """No request has arrived yet.

        Args:
            separators: of the engine.
            engine: the policy of requests that choose none.
        """
        super().__init__()
        self._separators = separators
        self.engine = engine
        self._numbers = count()
        self.decodes = DecodeTable()
        self.epochs = EpochTable()  # has the slots of ``decodes``
        # the last step's: most steps have the same requests in the same order
        self._batch: Batch | None = None

    def add(self, request: Request, policy: Policy, refusal: str | None = None) -> LiveRequest:
        """Take in a request that has arrived."""
        index = SeparatorIndex(policy, self._separators)
        number, slot = next(self._numbers), self.decodes.add()
        self.epochs.forget(slot)
        epochs = None if policy.max_position is None else Epochs(index)
        live = LiveRequest(request, number, index, slot, epochs, refusal)
        request.block_hashes = RequestHashes(request.block_hashes, live)
        self[request.request_id] = live
        self._batch = None
        return live

    def truncate(self, live: LiveRequest, num_tokens: int) -> None:
        """The request's tokens from position ``num_tokens`` on were replaced."""
        live.index.truncate(num_tokens)
        if live.epochs is not None:
            live.epochs.truncate(num_tokens)
        self.decodes.forget(live.slot)
        self.epochs.forget(live.slot)
        self._batch = None

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        live = self.pop(request_id)
        self.decodes.remove(live.slot)
        # a request whose hashes know it is a cycle, and a long prompt would wait for the collector
        live.request.block_hashes = [*live.request.block_hashes]
        self._batch = None

    def batch(self, ids: list[str]) -> Batch:
        """The requests of a step."""
        if self._batch is None or self._batch.ids != ids:
            self._batch = Batch.of([self[request_id] for request_id in ids], self.engine)
        return self._batch
