"""Which requests may share their tail: those whose tail will not become a ring.

With ``max_separators`` separators in it the tail is a ring, too, and its blocks are written again.
How many separators an answer will have nobody knows, and most requests may be as long as the model
allows. So a request shares its tail until it comes near the bound; then it is preempted once, and
goes on with copies of everything.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.request import Request

if TYPE_CHECKING:
    from vllm_sepllm.integration.scheduler.live_requests import RequestSeparators

# steps between two looks at the running requests
_STEPS = 16
# of those that a look comes too late by: also the steps that are in flight
_MARGIN = 4
_NEVER = 1 << 62


class SharedTails:
    """The running requests whose tail others may read."""

    def __init__(self, separators: "RequestSeparators", most_per_step: int) -> None:
        """``most_per_step``: tokens that a request can gain in a step."""
        self._separators = separators
        self._limit = separators.policy.max_separators
        self._slack = _STEPS * _MARGIN * most_per_step
        self._num_steps = 0
        # request -> the number of tokens from which on it may be near the bound
        self._due: dict[str, int] = {}

    def may_wrap(self, request: Request) -> bool:
        """Whether the tail of the request may become a ring soon, or at any time in a session."""
        if self._limit is None:
            return False
        # who did not share from the start is not looked at
        shares_nothing = self._due.get(request.request_id) == _NEVER
        return shares_nothing or request.resumable or self._room(request) < 0

    def _room(self, request: Request) -> int:
        """Separators that it may still get before it is near the bound; below 0: it is.

        What it may generate counts as separators, up to what the next look comes too late by. Once
        all of that fits, it always will.
        """
        assert self._limit is not None, "asked of a tail with a bound"
        known = request.num_tokens
        unknown = max(0, request.num_prompt_tokens + request.max_tokens - known)
        num_separators = self._separators.count_below(request.request_id, known)
        return self._limit - num_separators - min(unknown, self._slack)

    def takes_part(self, request: Request) -> None:
        """The request is in the step that is being scheduled."""
        if self._limit is not None and request.request_id not in self._due:
            is_near = self.may_wrap(request)
            self._due[request.request_id] = _NEVER if is_near else self._look_at(request)

    def _look_at(self, request: Request) -> int:
        return request.num_tokens + self._room(request) + 1

    def leaves(self, request_id: str) -> None:
        """The request has lost its blocks."""
        self._due.pop(request_id, None)

    def near_the_bound(self, running: Iterable[Request]) -> list[Request]:
        """Of the running requests those that must not share any longer; asked before each step."""
        self._num_steps += 1
        if self._num_steps % _STEPS:
            return []
        found = []
        for request in running:
            if request.num_tokens < self._due.get(request.request_id, _NEVER):
                continue
            if self.may_wrap(request):
                found.append(request)
            else:
                self._due[request.request_id] = self._look_at(request)
        return found
