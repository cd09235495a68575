"""Metrics of sepllm beside vLLM's own: on /metrics, in ``LLM.get_metrics()`` and in the log.

vLLM's entry point for stat loggers would load ours into every server on which this package is
installed, would switch statistics on where ``--disable-log-stats`` switched them off, and does not
reach ``vllm.LLM``. So ``StatLoggerManager`` is wrapped, once sepllm was selected in the process.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import (
    AggregateStatLoggerBase,
    LoggingStatLogger,
    PerEngineStatLoggerAdapter,
    PrometheusStatLogger,
    StatLoggerManager,
)
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from vllm_sepllm.integration.log import logger
from vllm_sepllm.integration.patch import wrap_once
from vllm_sepllm.integration.wire.config import is_selected, read_config
from vllm_sepllm.integration.wire.report import PolicyUsage, Report, take_report
from vllm_sepllm.policy.usage import label

# vLLM takes metrics of this prefix out of the registry when an engine follows another in one
# process, and shows them in LLM.get_metrics()
_PREFIX = "vllm:sepllm_"
GAUGES = {
    "logical_tokens": "Computed tokens of the requests that hold KV blocks: what full attention "
    "would hold.",
    "kept_tokens": "Tokens of those that the KV cache holds.",
    "blocks_saved": "KV blocks that full attention would fill beyond those that the kept tokens "
    "fill.",
    "checkpoint_blocks": "KV blocks that hold checkpoints of the prefix cache; most can be reused "
    "at any time.",
    "host_memory_usage_perc": "Part of host memory that holds checkpoints. 1 means 100 percent "
    "usage.",
}
COUNTERS = {
    "spilled_separators": "Separators that left the window of their request.",
    "unprotected_requests": "Requests whose prompt lacks the token that ends a protected prefix "
    "among its first max_protected tokens; they have initial_tokens alone.",
    "received_tokens": "Prompt tokens whose state was read from another instance.",
    "received_bytes": "Bytes of the states that were read from another instance.",
    "received_bytes_full": "Bytes that full attention has for the received tokens.",
    "restored_tokens": "Prompt tokens whose state came back from host memory.",
    "restored_bytes": "Bytes of the states that came back from host memory.",
    "saved_bytes": "Bytes that were copied to host memory when the KV cache evicted them.",
}


def install() -> None:
    """Wrap ``StatLoggerManager.__init__``; once per process."""
    wrap_once(StatLoggerManager, "__init__", _init)


def _init(
    original: Callable[..., None],
    self: StatLoggerManager,
    vllm_config: VllmConfig,
    *args: Any,
    **kwargs: Any,
) -> None:
    original(self, vllm_config, *args, **kwargs)
    if is_selected(vllm_config):
        # first: what it takes out of the statistics is for nobody else
        self.stat_loggers.insert(0, SepLLMStatLogger(vllm_config, self.stat_loggers))


def _is_logging(other: AggregateStatLoggerBase) -> bool:
    loggers: list[Any] = [other]
    if isinstance(other, PerEngineStatLoggerAdapter):
        loggers = list(other.per_engine_stat_loggers.values())
    return any(isinstance(one, LoggingStatLogger) for one in loggers)


class SepLLMStatLogger(AggregateStatLoggerBase):
    """Records the schedulers' reports, of all engines."""

    def __init__(self, vllm_config: VllmConfig, others: list[AggregateStatLoggerBase]) -> None:
        """``others`` are vLLM's: ours has their labels, and logs if they do."""
        prometheus = next(o for o in others if isinstance(o, PrometheusStatLogger))
        self._engine_labels = prometheus.per_engine_labelvalues
        self._metrics = _make_metrics(prometheus)
        self._is_logging = any(_is_logging(other) for other in others)
        self._last: dict[int, Report] = {}
        policy = read_config(vllm_config).policy
        name = label(policy.window, vllm_config.model_config.max_model_len)
        for engine_idx in self._engine_labels:
            self._set(engine_idx, {name: PolicyUsage()})

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Show the scheduler's report if one has come."""
        report = None if scheduler_stats is None else take_report(scheduler_stats)
        if report is not None:
            self._set(engine_idx, report)

    def _set(self, engine_idx: int, report: Report) -> None:
        self._last[engine_idx] = report
        for window, numbers in report.items():
            labels = (*self._engine_labels[engine_idx], window)
            for name in GAUGES:
                self._metrics[name].labels(*labels).set(getattr(numbers, name))
            for name in COUNTERS:
                self._metrics[name].labels(*labels).inc(getattr(numbers, name))

    def log(self) -> None:
        """A line beside vLLM's, as often."""
        line = summary([n for report in self._last.values() for n in report.values()])
        if self._is_logging and line is not None:
            logger.info(line)

    def log_engine_initialized(self) -> None:
        """Nothing: what sepllm is set to was logged when it was selected."""


def summary(numbers: list[PolicyUsage]) -> str | None:
    """The log's line; None while no request holds anything."""
    logical = sum(n.logical_tokens for n in numbers)
    kept = sum(n.kept_tokens for n in numbers)
    saved = sum(n.blocks_saved for n in numbers)
    if not logical:
        return None
    return (
        f"SepLLM: kept {_short(kept)} of {_short(logical)} tokens ({kept / logical:.0%}), "
        f"{saved} blocks saved"
    )


def _short(number: int) -> str:
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _make_metrics(prometheus: PrometheusStatLogger) -> dict[str, Any]:
    """Name -> metric, of the kind that vLLM's logger uses (Ray has its own)."""
    labels = ["model_name", "engine", "window"]
    make_gauge: Callable[..., Any] = functools.partial(
        prometheus._gauge_cls, multiprocess_mode="mostrecent", labelnames=labels
    )
    make_counter: Callable[..., Any] = functools.partial(prometheus._counter_cls, labelnames=labels)
    return {
        name: make(name=_PREFIX + name, documentation=documentation)
        for make, metrics in ((make_gauge, GAUGES), (make_counter, COUNTERS))
        for name, documentation in metrics.items()
    }
