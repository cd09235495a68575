"""What the scheduler's requests keep, and what their checkpoints hold: the metrics' numbers.

Added up once a second, and at once when the last request has gone, never per step: a step pays a
look at the clock.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.metrics.stats import SchedulerStats

from vllm_sepllm.integration.scheduler.prefix_cache.block_count import NamedBlocks
from vllm_sepllm.integration.wire.report import PolicyUsage, Report, attach_report
from vllm_sepllm.policy.layout import num_left_window
from vllm_sepllm.policy.usage import label, usage
from vllm_sepllm.policy.visibility import Policy

if TYPE_CHECKING:
    from vllm_sepllm.integration.scheduler.live_requests import RequestSeparators
    from vllm_sepllm.integration.scheduler.manager import SepLLMManager

_SECONDS = 1.0
# clients may bring windows of their own, and a label is a time series in somebody's database
_MAX_LABELS = 32
OTHER = "other"


class KvUsage:
    """Watches the requests that hold blocks, and reports on them by policy."""

    def __init__(
        self,
        managers: Sequence["SepLLMManager"],
        separators: "RequestSeparators",
        named_blocks: NamedBlocks,
        max_model_len: int,
    ) -> None:
        """Watch the requests of one scheduler.

        Args:
            managers: of the SepLLM groups; the first one will say who starts from a prefix and
                who leaves.
            separators: of the requests.
            named_blocks: those of the checkpoints.
            max_model_len: tokens of the longest request; a window as long is full attention.
        """
        managers[0].usage = self
        self._held = managers[0].req_to_blocks
        self._separators = separators
        self._named_blocks = named_blocks
        self._max_model_len = max_model_len
        self._block_sizes = [m.block_size for m in managers]
        # a policy, and the salt in the hashes of its checkpoints -> its label
        self._labels: dict[Policy, str] = {}
        self._salts: dict[bytes, str] = {}
        # label -> separators that left a window since the last report
        self._num_spilled: defaultdict[str, int] = defaultdict(int)
        # request -> those of its own that are counted, or were found in the prefix cache
        self._num_counted: dict[str, int] = {}
        self._next = 0.0
        self._was_busy = False

    def request_starts(self, request_id: str, num_tokens: int) -> None:
        """The request goes on from ``num_tokens`` tokens of the prefix cache."""
        self._num_counted[request_id] = self._spilled(request_id, num_tokens)

    def request_leaves(self, request_id: str) -> None:
        """The request is about to lose its blocks."""
        if request_id in self._held:
            num_tokens = self._separators.request(request_id).num_computed_tokens
            self._count(request_id, self._spilled(request_id, num_tokens))
            self._num_counted.pop(request_id, None)

    def report_to(self, stats: SchedulerStats) -> None:
        """Attach a report if it is time for one."""
        is_busy = bool(self._held)
        now = time.monotonic()
        if now >= self._next or (self._was_busy and not is_busy):
            self._next = now + _SECONDS
            attach_report(stats, self.report())
        self._was_busy = is_busy

    def report(self) -> Report:
        """The numbers of now, of every policy that was seen."""
        rows: defaultdict[Policy, list[tuple[int, int]]] = defaultdict(list)
        for request_id in self._held:
            num_tokens = self._separators.request(request_id).num_computed_tokens
            num_spilled = self._spilled(request_id, num_tokens)
            self._count(request_id, num_spilled)
            rows[self._separators.policy_of(request_id)].append((num_tokens, num_spilled))
        report = {name: PolicyUsage() for name in self._labels.values()}
        for policy, requests in rows.items():
            tokens, spilled = np.array(requests, dtype=np.int64).T
            held = usage(policy, tokens, spilled, self._block_sizes)
            entry = report[self._labels[policy]]
            entry.logical_tokens += held.logical_tokens
            entry.kept_tokens += held.kept_tokens
            entry.blocks_saved += held.blocks_saved
        for salt, num_blocks in self._named_blocks.count().items():
            report[self._salts[salt]].checkpoint_blocks += num_blocks
        for name, num_spilled in self._num_spilled.items():
            report[name].spilled_separators = num_spilled
        self._num_spilled.clear()
        return report

    def _spilled(self, request_id: str, num_tokens: int) -> int:
        left = num_left_window(self._separators.policy_of(request_id), num_tokens)
        return self._separators.count_below(request_id, left)

    def _count(self, request_id: str, num_spilled: int) -> None:
        name = self._label(request_id)
        known = self._num_counted.get(request_id, 0)
        # drafts that turn out wrong take tokens back; what was counted stays so
        if num_spilled > known:
            self._num_spilled[name] += num_spilled - known
            self._num_counted[request_id] = num_spilled

    def _label(self, request_id: str) -> str:
        policy = self._separators.policy_of(request_id)
        name = self._labels.get(policy)
        if name is None:
            has_room = len(self._labels) < _MAX_LABELS - 1
            name = label(policy, self._max_model_len) if has_room else OTHER
            self._labels[policy] = self._salts[self._separators.salt(request_id)] = name
        return name
