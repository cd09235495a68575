"""The metrics' numbers on their way from the scheduler to the process that has vLLM's loggers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from vllm.v1.metrics.stats import SchedulerStats

_MARK = "sepllm "


@dataclass(slots=True)
class PolicyUsage:
    """The numbers of the requests of one window.

    Attributes:
        logical_tokens: computed tokens of the requests that hold blocks; full attention would
            hold each.
        kept_tokens: how many of them are held.
        blocks_saved: KV blocks of the logical tokens less those of the kept ones.
        spilled_separators: that have left a window since the last report.
        checkpoint_blocks: blocks of the pool that only checkpoints lead to.
        unprotected_requests: that have arrived since the last report without a prefix to protect.
        received_tokens: of prompts whose state has arrived from another instance since then.
        received_bytes: of those states.
        received_bytes_full: that full attention has for those tokens.
        restored_tokens: of prompts whose state came back from host memory since then.
        restored_bytes: of those states.
        saved_bytes: that were copied to host memory since then.
        host_memory_usage_perc: part of host memory that holds checkpoints, between 0 and 1.
    """

    logical_tokens: int = 0
    kept_tokens: int = 0
    blocks_saved: int = 0
    spilled_separators: int = 0
    checkpoint_blocks: int = 0
    unprotected_requests: int = 0
    received_tokens: int = 0
    received_bytes: int = 0
    received_bytes_full: int = 0
    restored_tokens: int = 0
    restored_bytes: int = 0
    saved_bytes: int = 0
    host_memory_usage_perc: float = 0.0


Report = Mapping[str, PolicyUsage]  # the window, or what else names a policy -> its numbers


def attach_report(stats: SchedulerStats, report: Report) -> None:
    """Send a report with ``stats``.

    SchedulerStats has no field for plugins, and its encoding drops what it does not know. So the
    report is the name of a stage without requests, which vLLM's own loggers pass over.
    """
    numbers = {label: asdict(found) for label, found in report.items()}
    stats.num_kv_fetch_reqs_by_stage[_MARK + json.dumps(numbers)] = 0


def take_report(stats: SchedulerStats) -> Report | None:
    """Take the report out of ``stats``, if there is one."""
    stages = stats.num_kv_fetch_reqs_by_stage
    for stage in stages:
        if stage.startswith(_MARK):
            del stages[stage]
            numbers = json.loads(stage.removeprefix(_MARK))
            return {label: PolicyUsage(**found) for label, found in numbers.items()}
    return None
