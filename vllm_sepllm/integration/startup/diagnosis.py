"""Diagnosis of an installed vLLM: what it would say to sepllm, without starting an engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import nixl_utils
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY
from vllm_sepllm.integration.patch import is_wrapped
from vllm_sepllm.integration.wire.backend_name import BACKEND_NAME
from vllm_sepllm.integration.wire.config import read_config


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether vLLM's configuration of a model with sepllm passes. Layers are not built for it.

    Attributes:
        refusal: None if it passes; else why not, in one line.
        is_stock: the refusal is vLLM's own and comes without sepllm too.
        settings: if it passes, what was resolved from the arguments.
    """

    refusal: str | None
    is_stock: bool
    settings: dict[str, Any]


def platform() -> str:
    """vLLM's name for the device that it would run on."""
    return str(current_platform.device_name)


def is_registered() -> bool:
    """Whether vLLM knows our name once it has loaded its plugins, as at every start."""
    load_general_plugins()  # type: ignore[no-untyped-call]
    wraps_arguments = is_wrapped(EngineArgs, "create_engine_config")
    return wraps_arguments and BACKEND_NAME in AttentionBackendEnum.__members__


def has_nixl() -> bool:
    """Whether NIXL's library can be imported: without it vLLM's workers make no NixlConnector."""
    # reading NixlWrapper imports the library, as vLLM's base_worker.py does, which is refused where
    # it is None; vLLM warns of a library that is missing, and without a transfer none is missed
    return nixl_utils.is_nixl_available() and nixl_utils.NixlWrapper is not None


def judge(model: str, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> Verdict:
    """What ``vllm serve MODEL --attention-backend sepllm`` would say before it loads weights.

    Args:
        model: folder or name in the Hugging Face cache.
        arguments: fields of EngineArgs.
        config: what ``additional_config["sepllm"]`` would hold.
    """
    selected = {"attention_backend": "sepllm", "additional_config": {ADDITIONAL_CONFIG_KEY: config}}
    made = _configured({"model": model, **arguments, **selected})
    if isinstance(made, str):
        return Verdict(made, refusal({"model": model, **arguments}) is not None, {})
    return Verdict(None, False, _settings(made, config))


def refusal(arguments: Mapping[str, Any]) -> str | None:
    """Why vLLM would start no engine with these fields of EngineArgs, in one line.

    None: its configuration passes, with sepllm selected or without. Layers are not built for it.
    """
    made = _configured(arguments)
    return made if isinstance(made, str) else None


def _configured(arguments: Mapping[str, Any]) -> VllmConfig | str:
    """vLLM's configuration, or in one line why there is none."""
    try:
        return EngineArgs(**arguments).create_engine_config()
    except Exception as error:  # whatever vLLM raises is the finding
        return _one_line(error)


def _one_line(error: Exception) -> str:
    """The message without the lines that pydantic puts around it."""
    details = getattr(error, "errors", None)
    if callable(details):
        return "; ".join(str(item["msg"]) for item in details())
    return " ".join(str(error).split()) or type(error).__name__


def _settings(vllm_config: VllmConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    resolved = read_config(vllm_config).to_json()
    # what start-up alone needed: decode_backend, and a preset that stands for other settings
    others = {name: value for name, value in given.items() if name not in resolved}
    config = resolved | {name: value for name, value in others.items() if value is not None}
    separators = config.pop("separators", [])
    separator_ids = separators["token_ids"] if isinstance(separators, Mapping) else separators
    return {
        **config,
        "num_separator_ids": len(separator_ids),
        "max_model_len": vllm_config.model_config.max_model_len,
        "dtype": str(vllm_config.model_config.dtype).removeprefix("torch."),
        "block_size": vllm_config.cache_config.block_size,
    }
