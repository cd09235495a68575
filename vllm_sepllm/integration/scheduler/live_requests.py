"""The separators of every live request, shared by the managers and the scheduler."""

from collections.abc import Callable, Mapping
from hashlib import sha256

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.separators.definition import Separators
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.step.decode_table import DecodeTable
from vllm_sepllm.policy.step.staging import Commit, Staged, propose
from vllm_sepllm.policy.visibility import Policy


def salt_of(salted: BlockHash) -> bytes:
    """The policy in a hash of :meth:`RequestSeparators.salted`."""
    return salted[: sha256().digest_size]


class RequestSeparators:
    """Request id -> its separators, read from the scheduler's own requests."""

    def __init__(
        self,
        policy: Policy,
        separators: Separators,
        requests: Mapping[str, Request],
        choose: Callable[[Request], Policy] | None = None,
    ) -> None:
        """Nothing is known of any request yet.

        Args:
            policy: the engine's.
            separators: which tokens are separators.
            requests: the scheduler's table, not a copy.
            choose: the policy of a request, always the same; None: all have the engine's.
        """
        self.policy = policy
        self._choose = choose or (lambda request: policy)
        self._separators = separators
        self._requests = requests
        self._indices: dict[str, SeparatorIndex] = {}
        self._salts: dict[Policy, bytes] = {}
        # request -> what its last step proposed, until its next step or its blocks are freed
        self.staged: dict[str, Staged] = {}
        self.decodes = DecodeTable()
        self._slots: dict[str, int] = {}
        # grows whenever a request comes, goes or is truncated
        self.version = 0

    def request(self, request_id: str) -> Request:
        """The scheduler's request."""
        return self._requests[request_id]

    def salt(self, request_id: str) -> bytes:
        """The policy of the request, separators included, as 32 bytes.

        It keeps SepLLM layers apart. Layers of other kinds are found by vLLM's hashes, which know
        of a policy by the request's ``cache_salt`` (RequestChoices).
        """
        policy = self.policy_of(request_id)
        salt = self._salts.get(policy)
        if salt is None:
            salt = sha256(repr((policy, self._separators)).encode()).digest()
            self._salts[policy] = salt
        return salt

    def salted(self, request: Request) -> list[BlockHash]:
        """vLLM's hashes of the request's blocks, which no request of another policy has."""
        salt = self.salt(request.request_id)
        return [BlockHash(salt + block_hash) for block_hash in request.block_hashes]

    def policy_of(self, request_id: str) -> Policy:
        """The request's own policy."""
        return self.index(request_id).policy

    def index(self, request_id: str) -> SeparatorIndex:
        """The request's index, empty when first asked for."""
        index = self._indices.get(request_id)
        if index is None:
            policy = self._choose(self._requests[request_id])
            index = SeparatorIndex(policy, self._separators)
            self._indices[request_id] = index
            self._slots[request_id] = self.decodes.add()
            self.version += 1
        return index

    def slot(self, request_id: str) -> int:
        """The request's slot in ``decodes``."""
        self.index(request_id)
        return self._slots[request_id]

    def count_below(self, request_id: str, position: int) -> int:
        """Separators of the request at positions in [initial_tokens, position)."""
        index = self.index(request_id)
        index.extend(self._requests[request_id]._all_token_ids, position)
        return index.count_below(position)

    def truncate(self, request_id: str, num_tokens: int) -> None:
        """The request's tokens from position ``num_tokens`` on were replaced."""
        self.index(request_id).truncate(num_tokens)
        self.decodes.forget(self._slots[request_id])
        self.version += 1

    def propose(
        self, request_id: str, start: int, num_drafts: int, max_tokens: int
    ) -> tuple[Commit | None, Staged | None]:
        """Follow the proposals of a request through its next step (policy/step/staging.py)."""
        index = self.index(request_id)
        self.count_below(request_id, layout.num_left_window(index.policy, start))
        last = self.staged.pop(request_id, None)
        commit, staged = propose(index, last, start, num_drafts, max_tokens)
        if staged is not None:
            self.staged[request_id] = staged
        return commit, staged

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        if self._indices.pop(request_id, None) is not None:
            self.decodes.remove(self._slots.pop(request_id))
            self.version += 1

    def __len__(self) -> int:
        """Requests that are remembered."""
        return len(self._indices)
