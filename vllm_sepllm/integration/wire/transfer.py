"""What two instances must have in common before one reads a state that the other has computed."""

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

from vllm.config import KVTransferConfig, VllmConfig

from vllm_sepllm.config import ResolvedConfig
from vllm_sepllm.policy.visibility import Policy

NIXL, MULTI = "NixlConnector", "MultiConnector"
# has our connector, under vLLM's name
NIXL_MODULE = "vllm_sepllm.integration.wire.nixl"
# of kv_transfer_params, which an instance answers with and a proxy hands on to the next one
KEY = "sepllm"


def members(given: KVTransferConfig) -> list[KVTransferConfig]:
    """The connectors of a configuration: those within a MultiConnector, or its only one."""
    if not _is_multi(given):
        return [given]
    # as vLLM's MultiConnector makes them, but for an engine id, which vLLM lets no member have
    return [KVTransferConfig(**fields) for fields in _fields(given)]


def with_ours(given: KVTransferConfig) -> KVTransferConfig:
    """The configuration with our connector in the place of vLLM's; the user's object stays."""
    if given.kv_connector == NIXL:
        return replace(given, kv_connector_module_path=NIXL_MODULE)
    ours = [{**fields, "kv_connector_module_path": NIXL_MODULE} for fields in _fields(given)]
    extra = {**given.kv_connector_extra_config, "connectors": ours}
    return replace(given, kv_connector_extra_config=extra)


def lost_fields(given: KVTransferConfig) -> list[str]:
    """What vLLM's MultiConnector would pass over, or die of, by name.

    It reads the policy for failed loads and the role that its scheduler goes by from the outer
    configuration alone, gives members the outer engine id, and hands them nothing else of it.
    """
    if not _is_multi(given):
        return []
    own = ("kv_load_failure_policy", "engine_id")
    found = [f"{name} of a member" for name in own if any(name in f for f in _fields(given))]
    if any(fields.get("kv_role") != given.kv_role for fields in _fields(given)):
        found.append("a member's kv_role other than the outer one")
    outer = sorted(given.kv_connector_extra_config.keys() - {"connectors"})
    return found + [f"{name} of the outer kv_connector_extra_config" for name in outer]


def _is_multi(given: KVTransferConfig) -> bool:
    return given.kv_connector == MULTI and given.kv_connector_module_path is None


def _fields(given: KVTransferConfig) -> list[dict[str, Any]]:
    """Of the members of a MultiConnector."""
    found: list[dict[str, Any]] = given.kv_connector_extra_config.get("connectors", [])
    return found


def settings(vllm_config: VllmConfig, config: ResolvedConfig, policy: Policy) -> dict[str, Any]:
    """Everything besides the tokens that decides which entry lies where, as JSON values.

    ``policy`` is a request's, or the engine's.
    """
    separators = json.dumps([type(config.separators).__name__, asdict(config.separators)])
    return {
        "initial_tokens": policy.initial_tokens,
        "window": policy.window,
        "max_separators": policy.max_separators,
        "separators": hashlib.sha256(separators.encode()).hexdigest()[:12],
        "max_position": policy.max_position,
        "full_layers": list(config.full_layers),
        "block_size": vllm_config.cache_config.block_size,
        "tensor_parallel_size": vllm_config.parallel_config.tensor_parallel_size,
    }
