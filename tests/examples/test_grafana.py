"""The Grafana dashboard asks for metrics that exist, and has what Grafana's import needs."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.loggers import StatLoggerManager, unregister_vllm_metrics

from tests.support.tiny_models import ADDITIONAL_CONFIG, ARGUMENTS, write
from vllm_sepllm.integration.frontend.stat_logger import COUNTERS

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "examples" / "grafana" / "sepllm.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Sample names that a server with sepllm has, from vLLM's loggers and ours."""
    model = write("llama", tmp_path_factory.mktemp("llama"))
    arguments = ARGUMENTS | {"attention_backend": "sepllm", "additional_config": ADDITIONAL_CONFIG}
    StatLoggerManager(EngineArgs(model=str(model), **arguments).create_engine_config())
    names = {sample.name for metric in REGISTRY.collect() for sample in metric.samples}
    unregister_vllm_metrics()
    return names


def test_every_metric_of_the_queries_is_exported(exported: set[str]) -> None:
    asked = {name for query in QUERIES for name in re.findall(r"vllm:\w+", query)}
    # when a counter began: prometheus_client's own beside each
    begun = {f"vllm:sepllm_{name}_created" for name in COUNTERS}
    assert {name for name in exported if name.startswith("vllm:sepllm_")} <= asked | begun
    assert asked <= exported


def test_queries_name_the_model_and_balance() -> None:
    for query in QUERIES:
        metrics = len(re.findall(r"vllm:\w+", query))
        assert query.count('{model_name="$model_name"}') == metrics, query
        assert query.count("(") == query.count(")"), query


def test_grafana_can_import_it() -> None:
    assert DASHBOARD["id"] is None, "Grafana gives it"
    assert DASHBOARD["uid"]
    assert DASHBOARD["title"]
    assert DASHBOARD["schemaVersion"] >= 36
    assert {"from", "to"} <= set(DASHBOARD["time"])
    variables = {v["name"]: v["type"] for v in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "model_name": "query"}
    required = {r["id"] for r in DASHBOARD["__requires"]}
    panels = DASHBOARD["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    for panel in panels:
        assert panel["type"] in required
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [t["refId"] for t in panel["targets"]] == list("ABC"[: len(panel["targets"])])


def test_panels_do_not_overlap() -> None:
    for one, two in combinations([p["gridPos"] for p in DASHBOARD["panels"]], 2):
        is_beside = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        is_apart = one["y"] + one["h"] <= two["y"] or two["y"] + two["h"] <= one["y"]
        assert is_beside or is_apart
