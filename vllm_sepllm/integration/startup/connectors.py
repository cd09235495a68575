"""KV connectors: vLLM's NixlConnector, alone or within MultiConnector, with ours in its place."""

from dataclasses import replace
from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.platforms import current_platform

_NIXL, _MULTI = "NixlConnector", "MultiConnector"
# has our connector, under vLLM's name
_MODULE = "vllm_sepllm.integration.wire.nixl"


def with_ours(given: KVTransferConfig) -> KVTransferConfig:
    """The configuration with our connector in the place of vLLM's; the user's object stays."""
    if given.kv_connector == _NIXL:
        return replace(given, kv_connector_module_path=_MODULE)
    ours = [{**fields, "kv_connector_module_path": _MODULE} for fields in _fields(given)]
    extra = {**given.kv_connector_extra_config, "connectors": ours}
    return replace(given, kv_connector_extra_config=extra)


def reasons(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    """What sepllm does not serve of connectors, as startup/refusals.py has it."""
    given = vllm_config.kv_transfer_config
    if given is None:
        return []
    is_multi = given.kv_connector == _MULTI and given.kv_connector_module_path is None
    members, lost = [given], list[str]()
    if is_multi:
        # as vLLM's MultiConnector makes them, but for an engine id, which vLLM lets no member have
        members = [KVTransferConfig(**fields) for fields in _fields(given)]
        lost = _lost_fields(given)
    return [
        (
            not members,
            "a MultiConnector without members: list a NixlConnector under connectors in "
            "kv_connector_extra_config, or remove --kv-transfer-config",
        ),
        *(reason for member in members for reason in _member_reasons(member, is_within=is_multi)),
        (
            bool(lost),
            f"MultiConnector with {', '.join(lost)}, which vLLM passes over: have "
            "kv_load_failure_policy and one kv_role in the outer configuration, no engine_id in a "
            "member, and options of NIXL in the member's kv_connector_extra_config",
        ),
        (
            len(members) > 1,
            "several NixlConnectors within MultiConnector, which gives them one side channel and "
            "one set of kv_transfer_params: keep one of them",
        ),
        (
            vllm_config.speculative_config is not None,
            "speculative decoding with a KV connector, which would move unfinished drafts: remove "
            "--speculative-config or --kv-transfer-config",
        ),
        (
            vllm_config.parallel_config.pipeline_parallel_size > 1,
            "a KV connector with pipeline parallelism, whose stages vLLM's NixlConnector serves "
            "where all layers keep full attention alone: use --tensor-parallel-size",
        ),
    ]


def _member_reasons(member: KVTransferConfig, is_within: bool) -> list[tuple[bool, str]]:
    """Of a connector, alone or within MultiConnector."""
    name, module = member.kv_connector, member.kv_connector_module_path
    is_other = name != _NIXL or module not in (None, _MODULE)
    extra = member.kv_connector_extra_config
    return [
        (
            name == _MULTI and is_within,
            "a MultiConnector within MultiConnector, where vLLM looks for no NixlConnector: list "
            "its members in the outer one",
        ),
        (
            is_other and is_within,
            f"the KV connector {name} within MultiConnector, which moves blocks by token position: "
            "have a NixlConnector there alone",
        ),
        (
            is_other,
            f"the KV connector {name}, which moves blocks by token position: set kv_connector to "
            "NixlConnector, or remove --kv-transfer-config",
        ),
        (
            bool(extra.get("bidirectional_kv_xfer", False)),
            "KV transfers back to the prefill instance, which would read a part of a state: remove "
            "bidirectional_kv_xfer from kv_connector_extra_config",
        ),
        (
            not extra.get("enforce_handshake_compat", True),
            "a handshake without its check, by which instances with other settings would read "
            "each other's states: remove enforce_handshake_compat from kv_connector_extra_config",
        ),
        (
            member.kv_buffer_device == "cpu" and not current_platform.is_cpu(),
            "KV transfers through host memory, where vLLM copies a block once and the window's "
            "are written again: remove kv_buffer_device from --kv-transfer-config",
        ),
    ]


def _lost_fields(given: KVTransferConfig) -> list[str]:
    """What vLLM's MultiConnector would pass over, or die of, by name.

    It reads the policy for failed loads and the role that its scheduler goes by from the outer
    configuration alone, gives members the outer engine id, and hands them nothing else of it.
    """
    own = ("kv_load_failure_policy", "engine_id")
    found = [f"{name} of a member" for name in own if any(name in f for f in _fields(given))]
    if any(fields.get("kv_role") != given.kv_role for fields in _fields(given)):
        found.append("a member's kv_role other than the outer one")
    outer = sorted(given.kv_connector_extra_config.keys() - {"connectors"})
    return found + [f"{name} of the outer kv_connector_extra_config" for name in outer]


def _fields(given: KVTransferConfig) -> list[dict[str, Any]]:
    """Of the members of a MultiConnector."""
    found: list[dict[str, Any]] = given.kv_connector_extra_config.get("connectors", [])
    return found
