"""Of KV connectors NIXL's alone is served, by ours in its place; others are refused."""

from typing import Any

import pytest

from tests.support.model_folders import Models
from tests.support.refusals import Setting, check_sentence, refusal, refused_settings
from tests.support.tiny_models import selected

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
EXAMPLE = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def extra(name: str, value: Any) -> dict[str, Any]:
    return {"kv_connector_extra_config": {name: value}}


def multi(*members: dict[str, Any]) -> dict[str, Any]:
    return {"kv_connector": "MultiConnector", "kv_role": "kv_both"} | extra(
        "connectors", [*members]
    )


SETTINGS: list[Setting] = [
    (
        {"kv_transfer_config": EXAMPLE},
        "the KV connector ExampleConnector, which moves blocks by token position",
        "remove --kv-transfer-config",
    ),
    (
        {"kv_transfer_config": NIXL | extra("bidirectional_kv_xfer", True)},
        "KV transfers back to the prefill instance",
        "remove bidirectional_kv_xfer",
    ),
    (
        {"kv_transfer_config": NIXL | extra("enforce_handshake_compat", False)},
        "a handshake without its check",
        "remove enforce_handshake_compat",
    ),
    (
        {"kv_transfer_config": multi()},
        "a MultiConnector without members",
        "remove --kv-transfer-config",
    ),
    (
        {"kv_transfer_config": multi(NIXL, EXAMPLE)},
        "the KV connector ExampleConnector within MultiConnector, which moves blocks by token",
        "have a NixlConnector there alone",
    ),
    (
        {"kv_transfer_config": multi(NIXL, NIXL)},
        "several NixlConnectors within MultiConnector, which gives them one side channel",
        "keep one of them",
    ),
    (
        {"kv_transfer_config": multi(multi(NIXL))},
        "a MultiConnector within MultiConnector, where vLLM looks for no NixlConnector",
        "list its members in the outer one",
    ),
    *[
        ({"kv_transfer_config": given}, f"MultiConnector with {lost}", remedy)
        for given, lost, remedy in (
            (
                multi(NIXL | {"kv_load_failure_policy": "recompute"}),
                "kv_load_failure_policy of a member",
                "have kv_load_failure_policy and one kv_role in the outer configuration",
            ),
            (multi(NIXL | {"engine_id": "one"}), "engine_id of a member", "no engine_id"),
            (
                multi(NIXL | {"kv_role": "kv_consumer"}),
                "a member's kv_role other than the outer one",
                "one kv_role in the outer configuration",
            ),
            (
                multi(NIXL) | {"kv_connector_extra_config": {"connectors": [NIXL], "backends": []}},
                "backends of the outer kv_connector_extra_config",
                "options of NIXL in the member's kv_connector_extra_config",
            ),
        )
    ],
    (
        {"kv_transfer_config": multi(NIXL | extra("bidirectional_kv_xfer", True))},
        "KV transfers back to the prefill instance",
        "remove bidirectional_kv_xfer",
    ),
    (
        {"kv_transfer_config": NIXL, "pipeline_parallel_size": 2},
        "a KV connector with pipeline parallelism, whose stages vLLM's NixlConnector serves",
        "use --tensor-parallel-size",
    ),
]


@pytest.mark.parametrize(("arguments", "what", "remedy"), refused_settings(SETTINGS))
def test_settings(models: Models, arguments: dict[str, Any], what: str, remedy: str) -> None:
    check_sentence(refusal(models("llama"), **arguments), what, remedy)


def test_the_connector_becomes_ours_and_the_users_object_stays(models: Models) -> None:
    given = KVTransferConfig(**NIXL)
    config = selected(models("llama"), kv_transfer_config=given).create_engine_config()
    assert config.kv_transfer_config is not None
    made = KVConnectorFactory.get_connector_class(config.kv_transfer_config)
    assert made.__module__.startswith("vllm_sepllm")
    assert config.kv_transfer_config.has_connector("NixlConnector"), "where vLLM looks for the name"
    assert config.kv_transfer_config.engine_id == given.engine_id
    assert given.kv_connector_module_path is None


def test_the_connector_within_multi_connector_becomes_ours_and_the_users_object_stays(
    models: Models,
) -> None:
    member = dict(NIXL)
    given = KVTransferConfig(**multi(member))
    config = selected(models("llama"), kv_transfer_config=given).create_engine_config()
    ((made, _),) = MultiConnector._get_connector_classes_and_configs(config)
    assert made.__module__.startswith("vllm_sepllm")
    assert given.kv_connector_extra_config == {"connectors": [member]}
    assert member == NIXL
