"""The class behind the name ``SEPLLM``, for a vLLM that looks it up by itself: it refuses."""

from collections.abc import Callable
from typing import Any, NoReturn

from vllm.platforms import current_platform
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_sepllm.integration.patch import wrap_once
from vllm_sepllm.integration.wire.backend_name import BACKEND_NAME


class SepLLMBackend(AttentionBackend):
    """Never attends: our worker replaces the platform's own backend layer by layer instead.

    vLLM gets here only if a VllmConfig was put together without EngineArgs, so nobody chose our
    scheduler and worker.
    """

    @staticmethod
    def get_name() -> str:
        """The name in ``AttentionBackendEnum``."""
        return "SEPLLM"

    @staticmethod
    def get_impl_cls() -> NoReturn:
        """Refuse.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "the attention backend sepllm needs its own scheduler and worker, which are chosen by "
            "EngineArgs.create_engine_config(); create the VllmConfig with it, or use vllm.LLM or "
            "vllm serve"
        )

    @staticmethod
    def get_builder_cls() -> NoReturn:
        """Refuse, as :meth:`get_impl_cls`."""
        SepLLMBackend.get_impl_cls()


def install() -> None:
    """Let vLLM's CPU platform look our name up; once per process.

    It answers with its own backend whatever is asked for (vLLM 0.32), so an engine that was not
    set up by EngineArgs would serve with full attention without a word.
    """
    if not current_platform.is_cpu():
        return
    # not at the top: this module also loads where that platform is not the current one
    from vllm.platforms.cpu import CpuPlatform

    wrap_once(CpuPlatform, "get_attn_backend_cls", _get_attn_backend_cls)


def _get_attn_backend_cls(
    original: Callable[..., str],
    cls: type[Platform],
    selected_backend: AttentionBackendEnum | None,
    *args: Any,
    **kwargs: Any,
) -> str:
    if selected_backend and selected_backend.name == BACKEND_NAME:
        return selected_backend.get_path()
    return original(cls, selected_backend, *args, **kwargs)
