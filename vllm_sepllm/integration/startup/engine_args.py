"""Notice that a user selected sepllm and choose for him what the selection implies.

vLLM lets a plugin name a backend, but nothing in the name can bring its scheduler and worker.
``EngineArgs.create_engine_config`` is the one place that the CLI, ``LLM``, the async engine and
Ray Serve all pass, so that is what we wrap. To be dropped when a backend can name both itself.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vllm.config import AttentionConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.integration.startup import refusals
from vllm_sepllm.integration.startup.resolve import apply_selection
from vllm_sepllm.integration.wire.backend_name import WRAPPED_BACKENDS, register_backend_name
from vllm_sepllm.integration.wire.trained_config import check_served_as_trained

# The default of vLLM's CPU platform is 128, in which a compact cache wastes 64 entries on average.
# 32 is the smallest size for its kernels.
_CPU_BLOCK_SIZE = 32


def install() -> None:
    """Wrap ``EngineArgs.create_engine_config`` once per process."""
    original = EngineArgs.create_engine_config
    if getattr(original, "is_sepllm", False):
        return

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        return _create_engine_config(original, self, *args, **kwargs)

    setattr(create_engine_config, "is_sepllm", True)  # noqa: B010  # a function has no such field
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def _create_engine_config(
    original: Callable[..., VllmConfig], engine_args: EngineArgs, *args: Any, **kwargs: Any
) -> VllmConfig:
    if not _is_selected(engine_args):
        refusals.check_not_selected(engine_args)
        vllm_config = original(engine_args, *args, **kwargs)
        check_served_as_trained(vllm_config)
        return vllm_config
    refusals.check_engine_args(engine_args)
    with _selection_applied(engine_args):
        vllm_config = original(engine_args, *args, **kwargs)
    refusals.check_vllm_config(vllm_config)
    apply_selection(vllm_config)
    refusals.check_drafts(vllm_config)
    _install_in_front_end()
    return vllm_config


def _install_in_front_end() -> None:
    # not at the top: the API server's half of vLLM takes seconds to import, and no worker needs it
    from vllm_sepllm.integration.frontend import request_bodies, request_choices, stat_logger

    request_choices.install()
    request_bodies.install()
    stat_logger.install()


def _is_selected(engine_args: EngineArgs) -> bool:
    sepllm = register_backend_name()
    named = AttentionConfig.validate_backend_before(engine_args.attention_backend)
    return sepllm in (named, engine_args.attention_config.backend)


def _decode_backend(engine_args: EngineArgs) -> AttentionBackendEnum | None:
    """The backend to wrap; None: vLLM chooses.

    Raises:
        ValueError: if the platform has no choice, or we cannot wrap the one that the user names.
    """
    named = SepLLMConfig.from_additional_config(engine_args.additional_config).decode_backend
    if named is None:
        # vLLM may choose one whose cache is not made of rows
        return AttentionBackendEnum.TRITON_ATTN if current_platform.is_rocm() else None
    if current_platform.is_cpu():
        raise ValueError(
            f"sepllm's decode_backend {named!r} is for GPUs: vLLM has one attention backend on "
            "CPU; remove decode_backend"
        )
    if named.upper() not in WRAPPED_BACKENDS:
        raise ValueError(
            f"sepllm's decode_backend must be one of {list(WRAPPED_BACKENDS)}, got {named!r}"
        )
    return AttentionBackendEnum[named.upper()]


@contextmanager
def _selection_applied(engine_args: EngineArgs) -> Iterator[None]:
    """Show vLLM the arguments it would get without us; the user's own come back afterwards.

    The model is built with the platform's own backend, which the worker then wraps, so vLLM must
    not look for a backend of our name: the CPU platform would ignore it, others resolve it.
    """
    names = ("attention_backend", "attention_config", "block_size", "async_scheduling")
    saved = {name: getattr(engine_args, name) for name in names}
    engine_args.attention_backend = None
    engine_args.attention_config = replace(
        engine_args.attention_config, backend=_decode_backend(engine_args)
    )
    if engine_args.block_size is None and current_platform.is_cpu():
        engine_args.block_size = _CPU_BLOCK_SIZE
    if engine_args.speculative_config is not None:
        # which drafts are right decides where the next step begins, and the plan needs to know it
        engine_args.async_scheduling = False
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(engine_args, name, value)
