"""The separators of every live request, shared by the managers and the scheduler."""

from collections.abc import Mapping

import numpy as np
from vllm.v1.request import Request

from vllm_sepllm.policy.decode_table import DecodeTable
from vllm_sepllm.policy.separator_index import SeparatorIndex
from vllm_sepllm.policy.visibility import BoolArray, Policy


class RequestSeparators:
    """Request id -> its separators, read from the scheduler's own requests."""

    def __init__(self, policy: Policy, flags: BoolArray, requests: Mapping[str, Request]) -> None:
        """``flags`` is [vocab_size]; ``requests`` is the scheduler's table, not a copy."""
        self.policy = policy
        # token ids past the vocabulary (added tokens) read the last entry, which is False
        self._flags = np.append(flags, False)
        self._requests = requests
        self._indices: dict[str, SeparatorIndex] = {}
        self.decodes = DecodeTable(policy)
        self._slots: dict[str, int] = {}
        # grows whenever a request comes, goes or is truncated
        self.version = 0

    def request(self, request_id: str) -> Request:
        """The scheduler's request."""
        return self._requests[request_id]

    def index(self, request_id: str) -> SeparatorIndex:
        """The request's index, empty when first asked for."""
        index = self._indices.get(request_id)
        if index is None:
            index = self._indices[request_id] = SeparatorIndex(self.policy, self._flags)
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

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        if self._indices.pop(request_id, None) is not None:
            self.decodes.remove(self._slots.pop(request_id))
            self.version += 1

    def __len__(self) -> int:
        """Requests that are remembered."""
        return len(self._indices)
