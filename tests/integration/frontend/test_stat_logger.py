"""vLLM's loggers with ours among them: what users see, and that nothing is there unasked."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY, generate_latest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics import loggers
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.reader import get_metrics_snapshot
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.support.tiny_models import ADDITIONAL_CONFIG, ARGUMENTS, write
from vllm_sepllm.integration.frontend import stat_logger
from vllm_sepllm.integration.frontend.stat_logger import summary
from vllm_sepllm.integration.wire.report import PolicyUsage, attach_report

OURS = "vllm:sepllm_"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    yield
    loggers.unregister_vllm_metrics()


def configure(model: str, **arguments: Any) -> VllmConfig:
    return EngineArgs(model=model, **(ARGUMENTS | arguments)).create_engine_config()


def selected(model: str) -> VllmConfig:
    return configure(model, attention_backend="sepllm", additional_config=ADDITIONAL_CONFIG)


def sent(report: dict[str, PolicyUsage] | None) -> SchedulerStats:
    """Statistics as the API server gets them from the engine core's process."""
    stages = {"waiting_to_start": 0}
    stats = SchedulerStats(num_running_reqs=3, num_kv_fetch_reqs_by_stage=stages)
    if report is not None:
        attach_report(stats, report)
    frames = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    received = MsgpackDecoder(EngineCoreOutputs).decode(frames).scheduler_stats
    assert isinstance(received, SchedulerStats)
    return received


def shown() -> dict[tuple[str, str, str], float]:
    """(name, engine, window) -> value, of our metrics."""
    return {
        (m.name.removeprefix(OURS), m.labels["engine"], m.labels["window"]): m.value  # type: ignore[attr-defined]
        for m in get_metrics_snapshot()
        if m.name.startswith(OURS)
    }


def test_reports_of_all_engines_and_policies_are_shown(model: str) -> None:
    """Two data-parallel engines; gauges are replaced, counters add up, zero is there from the
    start, and a report that is not due changes nothing."""
    manager = StatLoggerManager(selected(model), engine_idxs=[0, 1])
    names = [*stat_logger.GAUGES, *stat_logger.COUNTERS]
    assert shown() == {(name, e, "252"): 0 for name in names for e in "01"}
    first = PolicyUsage(100, 60, 3, 5, 7, 1, 99, 10, 40, 8, 6, 13, 0.25)
    manager.record(sent({"252": first}), None, engine_idx=0)
    manager.record(sent({"252": PolicyUsage(10, 10, 0, 0, 1)}), None, engine_idx=1)
    other = {
        "252": PolicyUsage(200, 90, 4, 2, 7, 3, 1, 2, 3, 4, 5, 6, 0.5),
        "full": PolicyUsage(50, 50, 0, 0, 0, 0),
    }
    manager.record(sent(other), None, engine_idx=0)
    manager.record(sent(None), None, engine_idx=0)
    manager.record(None, None, engine_idx=0)
    found = shown()
    gauges, counters = [200, 90, 4, 7, 0.5], [7, 4, 100, 12, 43, 12, 11, 19]
    assert [found[name, "0", "252"] for name in names] == gauges + counters
    assert [found[name, "1", "252"] for name in names] == [10, 10, 0, 1, 0, *[0] * 8]
    assert [found[name, "0", "full"] for name in names] == [50, 50, 0, 0, 0, *[0] * 8]
    page = generate_latest(REGISTRY).decode()
    assert 'vllm:sepllm_spilled_separators_total{engine="0",' in page
    assert f'model_name="{model}",window="252"' in page


def test_an_engine_may_follow_another(model: str) -> None:
    """Metrics have one name in a process; vLLM takes its own out of the registry, ours too."""
    for config in (selected(model), selected(model)):
        StatLoggerManager(config)
    StatLoggerManager(configure(model))
    assert shown() == {}


def test_another_backend_has_stock_loggers(model: str) -> None:
    """Inert unless asked for, in a process where sepllm was selected before."""
    selected(model)
    ours, stock = StatLoggerManager(configure(model)), object.__new__(StatLoggerManager)
    StatLoggerManager.__init__.__wrapped__(stock, configure(model))  # type: ignore[attr-defined]
    assert [type(one) for one in ours.stat_loggers] == [type(one) for one in stock.stat_loggers]
    assert OURS not in generate_latest(REGISTRY).decode()


def lines_of(manager: StatLoggerManager, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the periodic log writes; vLLM's line is for debugging while nothing is generated."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="vllm"):
        manager.log()
    return [record.getMessage() for record in caplog.records]


def test_the_log_shows_what_is_kept(model: str, caplog: pytest.LogCaptureFixture) -> None:
    """Beside vLLM's line, which stays as it is; nothing while nothing is held."""
    manager = StatLoggerManager(selected(model), engine_idxs=[0, 1])
    manager.record(sent({"252": PolicyUsage(80_000, 12_000, 500, 5, 7)}), None, engine_idx=0)
    manager.record(sent({"252": PolicyUsage(100, 100, 12, 0, 0)}), None, engine_idx=1)
    lines = lines_of(manager, caplog)
    assert "SepLLM: kept 12.1k of 80.1k tokens (15%), 512 blocks saved" in lines
    assert sum("KV cache usage" in line for line in lines) == 2
    assert not any("KV fetch" in line for line in lines)
    for engine_idx in (0, 1):
        manager.record(sent({"252": PolicyUsage()}), None, engine_idx=engine_idx)
    assert not any("SepLLM" in line for line in lines_of(manager, caplog))


def test_no_line_where_vllm_writes_none(model: str, caplog: pytest.LogCaptureFixture) -> None:
    """As with several API servers: each would know a part."""
    manager = StatLoggerManager(selected(model), client_count=2)
    manager.record(sent({"252": PolicyUsage(100, 60, 3, 5, 7, 1)}), None)
    assert lines_of(manager, caplog) == []
    assert shown()["kept_tokens", "0", "252"] == 60


def test_a_report_harms_nobody_who_does_not_know_it(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A frontend that got its VllmConfig from another process and has stock loggers."""
    manager = object.__new__(StatLoggerManager)
    StatLoggerManager.__init__.__wrapped__(manager, selected(model))  # type: ignore[attr-defined]
    manager.record(sent({"252": PolicyUsage(100, 60, 3, 5, 7, 1)}), None)
    (line,) = lines_of(manager, caplog)
    assert "KV fetch" not in line


@pytest.mark.parametrize(
    ("numbers", "line"),
    [
        ([], None),
        ([PolicyUsage()], None),
        ([PolicyUsage(999, 998, 0)], "SepLLM: kept 998 of 999 tokens (100%), 0 blocks saved"),
        (
            [PolicyUsage(2_000_000, 999_950, 31), PolicyUsage(1000, 50, 1)],
            "SepLLM: kept 1.0M of 2.0M tokens (50%), 32 blocks saved",
        ),
    ],
)
def test_summary(numbers: list[PolicyUsage], line: str | None) -> None:
    assert summary(numbers) == line
