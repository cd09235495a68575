"""Sharing of tails: a running request may share its tail until the tail becomes a ring.

With ``max_separators`` separators in it the tail is a ring, too, and its blocks are written again.
The number of separators in an answer is not known, and most requests may be as long as the model
allows. So a request shares its tail until it comes near the bound; then it is preempted once, and
goes on with copies of everything. Where a full tail is no longer than the ring it is copied from
the start, as the ring is, unless all that the request may generate fits: no preemption is worth it.
"""

from collections.abc import Iterable

from vllm.v1.request import Request

from vllm_sepllm.integration.scheduler.live_requests import LiveRequest, LiveRequests

# steps between two looks at the running requests
_STEPS = 16
# safety factor: steps already in flight when we look
_MARGIN = 4
_NEVER = 1 << 62


class SharedTails:
    """Finds the running requests that must stop sharing their tail."""

    def __init__(self, requests: LiveRequests, most_per_step: int) -> None:
        """``most_per_step``: tokens that a request can gain in a step."""
        self._requests = requests
        self._limit = requests.engine.bound
        is_short = self._limit <= requests.engine.num_dense
        self._slack = _NEVER if is_short else _STEPS * _MARGIN * most_per_step
        self._num_steps = 0

    def may_wrap(self, live: LiveRequest) -> bool:
        """Whether the tail of the request may become a ring soon, or at any time in a session.

        Nor is the tail shared of a request that may renumber its positions: all keys are turned.
        """
        if live.may_renumber:
            return True
        # a request that did not share from the start is not looked at
        shares_nothing = live.holding.next_look == _NEVER
        return shares_nothing or live.request.resumable or self._room(live) < 0

    def _room(self, live: LiveRequest) -> int:
        """Separators that the request may still get before it is near the bound; below 0: it is.

        Tokens that it may generate until the next look count as separators. Once all that it may
        ever generate fits, it always will.
        """
        request = live.request
        unknown = max(0, request.num_prompt_tokens + request.max_tokens - request.num_tokens)
        num_separators = live.count_below(request.num_tokens)
        return self._limit - num_separators - min(unknown, self._slack)

    def takes_part(self, live: LiveRequest) -> None:
        """The request is in the step that is being scheduled."""
        if live.holding.next_look is None:
            # without a tail there is nothing to look for
            is_near = live.stays_dense or self.may_wrap(live)
            live.holding.next_look = _NEVER if is_near else self._next_look(live)

    def _next_look(self, live: LiveRequest) -> int:
        return live.request.num_tokens + self._room(live) + 1

    def near_the_bound(self, running: Iterable[Request]) -> list[Request]:
        """The running requests that must not share any longer; asked before each step."""
        self._num_steps += 1
        if self._num_steps % _STEPS:
            return []
        found = []
        for request in running:
            live = self._requests[request.request_id]
            next_look = live.holding.next_look
            if next_look is None or request.num_tokens < next_look:
                continue
            if self.may_wrap(live):
                found.append(request)
            else:
                live.holding.next_look = self._next_look(live)
        return found
