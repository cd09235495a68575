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

from vllm_sepllm.integration import refusals
from vllm_sepllm.integration.backend_name import register_backend_name
from vllm_sepllm.integration.resolve import apply_selection
from vllm_sepllm.integration.trained_config import check_served_as_trained

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
    return vllm_config


def _is_selected(engine_args: EngineArgs) -> bool:
    sepllm = register_backend_name()
    named = AttentionConfig.validate_backend_before(engine_args.attention_backend)
    return sepllm in (named, engine_args.attention_config.backend)


@contextmanager
def _selection_applied(engine_args: EngineArgs) -> Iterator[None]:
    """Show vLLM the arguments it would get without us; the user's own come back afterwards.

    The model is built with the platform's own backend, which the worker then wraps, so vLLM must
    not look for a backend of our name: the CPU platform would ignore it, others resolve it.
    """
    names = ("attention_backend", "attention_config", "block_size")
    saved = {name: getattr(engine_args, name) for name in names}
    engine_args.attention_backend = None
    engine_args.attention_config = replace(engine_args.attention_config, backend=None)
    if engine_args.block_size is None and current_platform.is_cpu():
        engine_args.block_size = _CPU_BLOCK_SIZE
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(engine_args, name, value)
