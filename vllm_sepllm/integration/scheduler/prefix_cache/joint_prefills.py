"""Joint prefills: prompts that begin alike and arrive together compute their beginning once.

Where vLLM shares blocks, a request reads what another one of the same step writes. A checkpoint is
read by copies made before the step, so a request that begins like a prefill of the step waits until
the prefill has left its checkpoint.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import RequestStatus

from vllm_sepllm.integration.scheduler.live_requests import Awaited, LiveRequest

# request, start, end -> positions in (start, end] at which its prefill leaves something to hit
PositionsAhead = Callable[[LiveRequest, int, int], list[int]]


class JointPrefills:
    """The prefills of the step that is being scheduled, and the requests that wait for one."""

    def __init__(
        self,
        hash_size: int,
        positions_ahead: PositionsAhead,
        num_found: Callable[[LiveRequest], int],
    ) -> None:
        """No prefill is scheduled yet.

        Args:
            hash_size: tokens of a hash block.
            positions_ahead: of a running prefill.
            num_found: tokens that a waiting request would find in the prefix cache now.
        """
        self._hash_size = hash_size
        self._positions_ahead = positions_ahead
        self._num_found = num_found
        self._prefills: dict[int, LiveRequest] = {}

    def takes_part(self, live: LiveRequest) -> None:
        """The request is in the step."""
        if live.request.num_computed_tokens < live.request.num_prompt_tokens:
            self._prefills[live.number] = live

    def end_step(self) -> None:
        """The step is scheduled."""
        self._prefills.clear()

    def must_wait(self, live: LiveRequest) -> bool:
        """Whether a waiting request should start in a later step, from what a prefill leaves."""
        awaited = live.holding.awaited
        if awaited is None or not self._is_ahead(awaited):
            awaited = live.holding.awaited = self._find(live)
        return awaited is not None

    def _is_ahead(self, awaited: Awaited) -> bool:
        leader = self._prefills.get(awaited.number)
        # a leader may have been preempted since it took part in the step
        if leader is None or leader.request.status != RequestStatus.RUNNING:
            return False
        return leader.request.num_computed_tokens < awaited.position

    def _find(self, live: LiveRequest) -> Awaited | None:
        """The prefill that will leave the longest prefix of the request, if it is worth waiting.

        A beginning shorter than both the window and half of what is left of the prompt is not: it
        is computed faster than a step of waiting takes.
        """
        longest = live.request.num_tokens - 1
        ahead = [
            Awaited(leader.number, position)
            for leader in self._prefills.values()
            if (position := self._position(live, leader, longest))
        ]
        found = [awaited for awaited in ahead if self._is_ahead(awaited)]
        if not found:
            return None
        best = max(found, key=lambda awaited: awaited.position)
        num_found = self._num_found(live)
        enough = max(1, min(live.policy.window, (longest + 1 - num_found) // 2))
        return best if best.position >= num_found + enough else None

    def _position(self, live: LiveRequest, leader: LiveRequest, longest: int) -> int:
        """The longest prefix of the request that the leader's prefill is still to leave; or 0."""
        hashes, others = live.request.block_hashes, leader.request.block_hashes
        if not hashes or not others or hashes[0] != others[0]:
            return 0
        common = min(_num_common(hashes, others) * self._hash_size, longest)
        start = leader.request.num_computed_tokens
        return max(self._positions_ahead(leader, start, common), default=0)


def _num_common(one: Sequence[BlockHash], other: Sequence[BlockHash]) -> int:
    """Blocks that two prompts have in common; hashes chain, so behind a difference all differ."""
    numbers = range(min(len(one), len(other)))
    return bisect_left(numbers, True, key=lambda number: one[number] != other[number])
