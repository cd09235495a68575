"""What the scheduler's requests keep, and what their checkpoints hold: the metrics' numbers.

Added up once a second, and at once when the last request has gone, never per step: a step pays a
look at the clock.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from vllm.v1.metrics.stats import SchedulerStats

from vllm_sepllm.integration.scheduler.live_requests import LiveRequest, LiveRequests, Loading
from vllm_sepllm.integration.scheduler.manager import SepLLMManager
from vllm_sepllm.integration.scheduler.prefix_cache.block_count import CheckpointBlockCount
from vllm_sepllm.integration.scheduler.prefix_cache.host_checkpoints import HostCheckpoints
from vllm_sepllm.integration.wire.report import PolicyUsage, Report, attach_report
from vllm_sepllm.policy.usage import label, usage
from vllm_sepllm.policy.visibility import BatchPolicy

_SECONDS = 1.0
# windows that get a label: clients choose them, and each label is a time series in a database
_MAX_LABELS = 32
OTHER = "other"


class KvUsage:
    """Watches the requests that hold blocks, and reports on them by window."""

    def __init__(
        self,
        managers: Sequence[SepLLMManager],
        requests: LiveRequests,
        block_count: CheckpointBlockCount,
        host: HostCheckpoints | None,
        max_model_len: int,
    ) -> None:
        """Watch the requests of one scheduler.

        Args:
            managers: of the SepLLM groups.
            requests: of the scheduler.
            block_count: blocks of the checkpoints.
            host: checkpoints in host memory; None: it is off.
            max_model_len: tokens of the longest request; a window as long is full attention.
        """
        self._held = managers[0].req_to_blocks
        self._requests = requests
        self._block_count = block_count
        self._host = host
        self._max_model_len = max_model_len
        self._sizes = {m.kv_cache_group_id: m.block_size for m in managers}
        self._labels: dict[int, str] = {}
        # label -> what has happened since the last report
        self._counted: defaultdict[str, PolicyUsage] = defaultdict(PolicyUsage)
        self._next = 0.0
        self._was_busy = False

    def arrives_unprotected(self, live: LiveRequest) -> None:
        """The request's prompt has no prefix to protect, though the engine protects one."""
        self._counted[self._label(live.policy.window)].unprotected_requests += 1

    def receives(self, live: LiveRequest, block_bytes: int, layer_bytes: Sequence[int]) -> None:
        """The state that the request was waiting for has arrived whole.

        Args:
            live: the request.
            block_bytes: of a block of the pool, of all workers together.
            layer_bytes: of what the layers of a KV cache group have in a block; of a group with
                fewer layers than the largest one that is less.
        """
        loading = live.holding.loading
        assert loading is not None, "the connector knows what it reads"
        full = [
            -(-loading.num_tokens // self._sizes[group_id]) if group_id in self._sizes else number
            for group_id, number in enumerate(loading.num_blocks)
        ]
        received = self._counted[self._label(live.policy.window)]
        received.received_tokens += loading.num_tokens
        received.received_bytes += sum(loading.num_blocks) * block_bytes
        received.received_bytes_full += sum(n * b for n, b in zip(full, layer_bytes, strict=True))

    def restores(self, live: LiveRequest, loading: Loading, block_bytes: int) -> None:
        """A state that the request can begin with comes back from host memory; see ``receives``."""
        restored = self._counted[self._label(live.policy.window)]
        restored.restored_tokens += loading.num_tokens
        restored.restored_bytes += sum(loading.num_blocks) * block_bytes

    def saves(self, slots: Iterable[int], block_bytes: int) -> None:
        """The step that is scheduled now copies blocks to these slots of host memory."""
        assert self._host is not None, "only host memory has slots"
        for slot in slots:
            self._counted[self._label(self._host.windows[slot])].saved_bytes += block_bytes

    def leaves(self, live: LiveRequest) -> None:
        """The request is about to lose its blocks."""
        if live.request.request_id in self._held:
            self._count(live, live.num_spilled(live.request.num_computed_tokens))

    def report_to(self, stats: SchedulerStats) -> None:
        """Attach a report if it is time for one."""
        is_busy = bool(self._held)
        now = time.monotonic()
        if now >= self._next or (self._was_busy and not is_busy):
            self._next = now + _SECONDS
            attach_report(stats, self.report())
        self._was_busy = is_busy

    def report(self) -> Report:
        """The numbers of now, of every window that was seen."""
        rows: defaultdict[str, list[tuple[LiveRequest, int]]] = defaultdict(list)
        for request_id in self._held:
            live = self._requests[request_id]
            num_spilled = live.num_spilled(live.request.num_computed_tokens)
            self._count(live, num_spilled)
            rows[self._label(live.policy.window)].append((live, num_spilled))
        num_blocks = self._block_count.count()
        on_host = {} if self._host is None else self._host.usage()
        windows = [*self._labels, *num_blocks, *on_host]
        names = dict.fromkeys(self._label(window) for window in windows)
        report = {name: self._counted.pop(name, PolicyUsage()) for name in names}
        for name, requests in rows.items():
            policies = [live.policy for live, _ in requests]
            held = usage(
                BatchPolicy.of(policies, self._requests.engine),
                np.array([live.request.num_computed_tokens for live, _ in requests]),
                np.array([num_spilled for _, num_spilled in requests]),
                [*self._sizes.values()],
            )
            report[name].logical_tokens = held.logical_tokens
            report[name].kept_tokens = held.kept_tokens
            report[name].blocks_saved = held.blocks_saved
        for window, number in num_blocks.items():
            report[self._label(window)].checkpoint_blocks += number
        for window, part in on_host.items():
            report[self._label(window)].host_memory_usage_perc += part
        return report

    def _count(self, live: LiveRequest, num_spilled: int) -> None:
        name, known = self._label(live.policy.window), live.holding.num_counted
        # drafts that turn out wrong take tokens back; what was counted stays so
        if num_spilled > known:
            self._counted[name].spilled_separators += num_spilled - known
            live.holding.num_counted = num_spilled

    def _label(self, window: int) -> str:
        name = self._labels.get(window)
        if name is None:
            has_room = len(self._labels) < _MAX_LABELS - 1
            name = label(window, self._max_model_len) if has_room else OTHER
            self._labels[window] = name
        return name
