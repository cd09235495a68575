"""vLLM names that our metrics rely on (see contracts.py)."""

from vllm_sepllm.integration.contracts.contract import Contract, fields

_LOGGERS = "vllm.v1.metrics.loggers"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

METRICS = (
    Contract(
        f"{_SCHEDULER}.make_stats",
        "overridden: our report travels with vLLM's statistics",
        (
            *("spec_decoding_stats", "kv_connector_stats", "cudagraph_stats", "perf_stats"),
            "ec_connector_stats",
        ),
    ),
    *fields(_SCHEDULER, "read: are there statistics?", "log_stats"),
    *fields(
        "vllm.v1.metrics.stats:SchedulerStats",
        "carries our report as a stage of that name; vLLM's loggers ask for theirs, and print "
        "theirs if any stage has a request",
        "num_kv_fetch_reqs_by_stage",
    ),
    Contract(
        f"{_LOGGERS}:StatLoggerManager.__init__",
        "wrapped: adds our logger",
        (
            *("vllm_config", "engine_idxs", "custom_stat_loggers", "enable_default_loggers"),
            *("aggregate_engine_logging", "client_count"),
        ),
    ),
    *fields(f"{_LOGGERS}:StatLoggerManager", "ours becomes the first", "stat_loggers"),
    Contract(
        f"{_LOGGERS}:StatLoggerBase.record",
        "overridden: takes the report out",
        ("scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
    ),
    Contract(f"{_LOGGERS}:StatLoggerBase.log", "overridden: our line", ()),
    Contract(f"{_LOGGERS}:StatLoggerBase.log_engine_initialized", "overridden", ()),
    *fields(
        f"{_LOGGERS}:PrometheusStatLogger",
        "read: metrics of the same kind, with the same labels",
        *("_gauge_cls", "_counter_cls", "per_engine_labelvalues"),
    ),
    *fields(
        f"{_LOGGERS}:PerEngineStatLoggerAdapter",
        "read: does any of them write vLLM's line?",
        "per_engine_stat_loggers",
    ),
)
