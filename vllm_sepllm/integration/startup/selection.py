"""The selection of sepllm: seen in EngineArgs, completed in the VllmConfig that they make.

vLLM lets a plugin name a backend, but nothing in the name can bring its scheduler and worker.
``EngineArgs.create_engine_config`` is the one place that the CLI, ``LLM``, the async engine and
Ray Serve all pass, so that is what we wrap. To be dropped when a backend can name both itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from vllm import envs
from vllm.config import AttentionConfig, CacheConfig, ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY, ResolvedConfig, SepLLMConfig
from vllm_sepllm.integration.log import logger
from vllm_sepllm.integration.patch import wrap_once
from vllm_sepllm.integration.startup import lengths, refusals
from vllm_sepllm.integration.startup.block_size import CPU_BLOCK_SIZE
from vllm_sepllm.integration.startup.connectors import with_ours
from vllm_sepllm.integration.wire.backend_name import WRAPPED_BACKENDS, register_backend_name
from vllm_sepllm.integration.wire.config import ASYNC_SCHEDULER, SCHEDULER, write_config
from vllm_sepllm.integration.wire.host_memory import write_host_bytes
from vllm_sepllm.integration.wire.trained_config import check_served_as_trained, is_trained
from vllm_sepllm.policy import trained
from vllm_sepllm.policy.initial import protected_end
from vllm_sepllm.policy.separators.definition import IntervalSeparators
from vllm_sepllm.policy.separators.rules import token_separators

_CPU_WORKER = "vllm_sepllm.integration.worker.cpu.worker.SepLLMCPUWorker"
_GPU_WORKER = "vllm_sepllm.integration.worker.gpu.worker.SepLLMGPUWorker"


def install() -> None:
    """Wrap ``EngineArgs.create_engine_config``; once per process."""
    wrap_once(EngineArgs, "create_engine_config", _create_engine_config)


def _create_engine_config(
    original: Callable[..., VllmConfig], engine_args: EngineArgs, *args: Any, **kwargs: Any
) -> VllmConfig:
    if not _is_named(engine_args):
        refusals.check_not_selected(engine_args)
        vllm_config = original(engine_args, *args, **kwargs)
        check_served_as_trained(vllm_config)
        return vllm_config
    refusals.check_engine_args(engine_args)
    given = SepLLMConfig.from_additional_config(engine_args.additional_config)
    is_renumbered = given.positions == "renumbered"
    with (
        _selection_hidden(engine_args, _decode_backend(given)),
        lengths.unbounded(is_on=is_renumbered),
    ):
        vllm_config = original(engine_args, *args, **kwargs)
    refusals.check_vllm_config(vllm_config)
    if is_renumbered:
        refusals.check_renumbered(vllm_config, given.max_position)
    given = _with_trained_policy(given, vllm_config.model_config)
    config = _resolve(given, vllm_config)
    refusals.check_drafts(vllm_config, config.window)
    _complete(vllm_config, config)
    if (size := engine_args.kv_offloading_size) is not None:
        refusals.check_offloading(engine_args, vllm_config)
        write_host_bytes(vllm_config, int(size * (1 << 30)))
    if not is_renumbered:
        _warn_of_positions(vllm_config.model_config)
    _warn_of_checkpoints(given, vllm_config.cache_config)
    _log(given, config, vllm_config.cache_config.block_size)
    _install_in_front_end()
    return vllm_config


def _is_named(engine_args: EngineArgs) -> bool:
    sepllm = register_backend_name()
    named = AttentionConfig.validate_backend_before(engine_args.attention_backend)
    return sepllm in (named, engine_args.attention_config.backend)


def _decode_backend(given: SepLLMConfig) -> AttentionBackendEnum | None:
    """The backend to wrap; None: vLLM chooses.

    Raises:
        ValueError: if the platform has no choice, or we cannot wrap the one that the user names.
    """
    named = given.decode_backend
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
def _selection_hidden(
    engine_args: EngineArgs, backend: AttentionBackendEnum | None
) -> Iterator[None]:
    """Show vLLM the arguments it would get without us; the user's own come back afterwards.

    The model is built with the platform's own backend, which the worker then wraps, so vLLM must
    not look for a backend of our name: the CPU platform would ignore it, others resolve it.
    """
    names = (
        *("attention_backend", "attention_config", "block_size", "async_scheduling"),
        "kv_offloading_size",
    )
    saved = {name: getattr(engine_args, name) for name in names}
    engine_args.attention_backend = None
    engine_args.kv_offloading_size = None  # vLLM would make a connector of it
    engine_args.attention_config = replace(engine_args.attention_config, backend=backend)
    if engine_args.block_size is None and current_platform.is_cpu():
        engine_args.block_size = CPU_BLOCK_SIZE
    if engine_args.speculative_config is not None:
        # vLLM's default would be on; asking for it is refused
        engine_args.async_scheduling = False
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(engine_args, name, value)


def _with_trained_policy(given: SepLLMConfig, model_config: ModelConfig) -> SepLLMConfig:
    """``given``, completed by what a checkpoint was trained with; what the user wrote wins.

    Raises:
        ValueError: if the checkpoint's policy cannot be served exactly.
    """
    if not is_trained(model_config):
        return given
    policy = trained.trained_policy(
        model_config.hf_config.to_dict(),
        num_layers=model_config.get_total_num_hidden_layers(),
        max_model_len=model_config.max_model_len,
    )
    fields: dict[str, Any] = asdict(policy)
    logger.info("The checkpoint was trained with SepLLM; its policy is %s.", fields)
    if given.protect is not None:
        raise ValueError(
            f"this checkpoint was trained with {policy.initial_tokens} initial tokens, and a "
            "protected prefix would make another model of it; remove protect"
        )
    for name in sorted(given.model_fields_set):
        value = getattr(given, name)
        if name in fields and value != fields[name]:
            logger.warning(
                "sepllm: %s is set to %s, but the checkpoint was trained with %s.",
                name,
                value,
                fields[name],
            )
        fields[name] = value
    return SepLLMConfig.from_additional_config({ADDITIONAL_CONFIG_KEY: fields})


def _resolve(given: SepLLMConfig, vllm_config: VllmConfig) -> ResolvedConfig:
    model_config = vllm_config.model_config
    # None with skip_tokenizer_init, which does for token ids
    tokenizer = cached_tokenizer_from_config(model_config)
    vocab_size = model_config.get_vocab_size()
    protect = given.protect
    return given.resolve(
        separators=token_separators(given.separators, tokenizer, vocab_size),
        end_id=None if protect is None else protected_end(protect, tokenizer, vocab_size),
        num_layers=model_config.get_total_num_hidden_layers(),
        max_model_len=model_config.max_model_len,
        block_size=vllm_config.cache_config.block_size,
        trained_length=lengths.trained_length(model_config),
    )


def _complete(vllm_config: VllmConfig, config: ResolvedConfig) -> None:
    """Write what every process needs into ``vllm_config``; nothing is derived again later."""
    write_config(vllm_config, config)
    scheduler_config = vllm_config.scheduler_config
    if scheduler_config.disable_hybrid_kv_cache_manager:
        # without it vLLM gives all layers one kind of cache, and ours has a kind of its own
        scheduler_config.disable_hybrid_kv_cache_manager = False
        logger.warning("sepllm needs the hybrid KV cache manager: it stays on.")
    scheduler_config.scheduler_cls = (
        ASYNC_SCHEDULER if scheduler_config.async_scheduling else SCHEDULER
    )
    vllm_config.parallel_config.worker_cls = (
        _CPU_WORKER if current_platform.is_cpu() else _GPU_WORKER
    )
    if vllm_config.kv_transfer_config is not None:
        vllm_config.kv_transfer_config = with_ours(vllm_config.kv_transfer_config)


def _warn_of_positions(model_config: ModelConfig) -> None:
    """A warning where more positions are served than the model was trained on.

    vLLM admits that only with its override variable. A bounded cache suggests that text may go on
    for ever, but positions grow with it.
    """
    trained, key = model_config.model_arch_config.derived_max_model_len_and_key
    if envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN and model_config.max_model_len > trained:
        logger.warning(
            "sepllm bounds the KV cache, not positions: beyond the %s=%d of the model's "
            "config.json answers may be nonsense, and max_model_len is %d; set max_model_len to %d "
            "or configure RoPE scaling.",
            key,
            trained,
            model_config.max_model_len,
            trained,
        )


def _warn_of_checkpoints(given: SepLLMConfig, cache_config: CacheConfig) -> None:
    """A warning where ``checkpoint_interval`` is set to no purpose."""
    if given.checkpoint_interval is not None and not cache_config.enable_prefix_caching:
        logger.warning(
            "sepllm's checkpoint_interval has no effect: prefix caching is off, and checkpoints "
            "are what it caches."
        )


def _log(given: SepLLMConfig, config: ResolvedConfig, block_size: int) -> None:
    initial, separators = config.initial, config.separators
    protected = ""
    if initial.end_id is not None:
        protected = f" or all up to the first {given.protect!r} among {initial.max_tokens}"
    if isinstance(separators, IntervalSeparators):
        rule, num_ids = f"every {separators.interval}th token", 0
    else:
        named = given.separators if isinstance(given.separators, str) else "given"
        rule, num_ids = given.preset or named, len(separators.token_ids)
    logger.info(
        "sepllm keeps the first %d tokens%s, the last %d and up to %d separators in between "
        "(%s, %d token ids)%s%s; block size %d.%s",
        initial.least,
        protected,
        config.window,
        config.max_separators,
        rule,
        num_ids,
        f"; layers {list(config.full_layers)} keep full attention" if config.full_layers else "",
        "" if config.max_position is None else f"; positions begin anew at {config.max_position}",
        block_size,
        # vLLM logs that figure soon after, and it reads as if no more requests would fit
        " vLLM's maximum concurrency counts on that many in each request; most texts have fewer."
        if config.max_separators
        else "",
    )


def _install_in_front_end() -> None:
    # not at the top: the API server's half of vLLM takes seconds to import, and no worker needs it
    from vllm_sepllm.integration.frontend import request_bodies, request_choices, stat_logger

    request_choices.install()
    request_bodies.install()
    stat_logger.install()
