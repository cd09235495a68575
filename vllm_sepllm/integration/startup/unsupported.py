"""The name ``sepllm`` beside a vLLM that this package was not written for: a reason alone."""

from collections.abc import Callable
from enum import EnumMeta
from typing import Any

from vllm_sepllm.integration.patch import wrap_once
from vllm_sepllm.integration.wire.backend_name import BACKEND_NAME


def install(reason: str) -> None:
    """Answer whoever looks our name up with ``reason``; once per process.

    vLLM: AttentionBackendEnum's own metaclass raises "Unknown attention backend" otherwise, and
    every spelling of the option passes it. Without AttentionBackendEnum or its metaclass
    vLLM's own message stays.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
    except ImportError:
        return
    lookup = type(AttentionBackendEnum)
    if lookup is EnumMeta:  # Python's
        return

    def around(original: Callable[..., Any], cls: type, name: str) -> Any:
        if name == BACKEND_NAME:
            raise ValueError(f"sepllm is not available: {reason}")
        return original(cls, name)

    wrap_once(lookup, "__getitem__", around)
