"""Complete a VllmConfig for sepllm: the resolved policy, the scheduler, the worker."""

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY, SepLLMConfig
from vllm_sepllm.integration.wire.trained_config import with_trained_policy
from vllm_sepllm.policy.separators.rules import separator_ids

# vLLM logs through the handlers of the logger "vllm"; ours must be its child to be seen
logger = init_logger("vllm.plugins.sepllm")

_SCHEDULER = "vllm_sepllm.integration.scheduler.scheduler.SepLLMScheduler"
_ASYNC_SCHEDULER = "vllm_sepllm.integration.scheduler.scheduler.SepLLMAsyncScheduler"
_CPU_WORKER = "vllm_sepllm.integration.worker.cpu.worker.SepLLMCPUWorker"
_GPU_WORKER = "vllm_sepllm.integration.worker.gpu.worker.SepLLMGPUWorker"


def apply_selection(vllm_config: VllmConfig) -> None:
    """Write what every process needs into ``vllm_config``; nothing is derived again later.

    Raises:
        ValueError: if ``additional_config["sepllm"]`` is wrong, by itself or for this model.
    """
    model_config = vllm_config.model_config
    additional_config = vllm_config.additional_config
    assert isinstance(additional_config, dict), "refusals.check_engine_args lets only a dict pass"
    given = with_trained_policy(
        SepLLMConfig.from_additional_config(additional_config), model_config
    )
    resolved = given.resolve(
        separator_ids=_separator_ids(given, model_config),
        num_layers=model_config.get_total_num_hidden_layers(),
        max_model_len=model_config.max_model_len,
        block_size=vllm_config.cache_config.block_size,
    )
    vllm_config.additional_config = {
        **additional_config,
        ADDITIONAL_CONFIG_KEY: resolved.model_dump(mode="json"),
    }
    scheduler_config = vllm_config.scheduler_config
    if scheduler_config.disable_hybrid_kv_cache_manager:
        # without it vLLM gives all layers one kind of cache, and ours has a kind of its own
        scheduler_config.disable_hybrid_kv_cache_manager = False
        logger.warning("sepllm needs the hybrid KV cache manager: it stays on.")
    scheduler_config.scheduler_cls = (
        _ASYNC_SCHEDULER if scheduler_config.async_scheduling else _SCHEDULER
    )
    vllm_config.parallel_config.worker_cls = (
        _CPU_WORKER if current_platform.is_cpu() else _GPU_WORKER
    )
    _log(given, resolved, vllm_config)


def has_our_scheduler(vllm_config: VllmConfig) -> bool:
    """Whether :func:`apply_selection` completed it."""
    return vllm_config.scheduler_config.scheduler_cls in (_SCHEDULER, _ASYNC_SCHEDULER)


def _separator_ids(config: SepLLMConfig, model_config: ModelConfig) -> tuple[int, ...]:
    """What ``separators`` means for the model's tokenizer."""
    # None with skip_tokenizer_init, which does for a list of token ids
    tokenizer = cached_tokenizer_from_config(model_config)
    return separator_ids(config.separators, tokenizer, model_config.get_vocab_size())


def _log(given: SepLLMConfig, resolved: SepLLMConfig, vllm_config: VllmConfig) -> None:
    rule: str = given.separators if isinstance(given.separators, str) else "given"
    if given.preset is not None:
        rule = given.preset if given.interval is None else f"every {given.interval}th token"
    logger.info(
        "sepllm keeps the first %d tokens, the last %d and up to %d separators in between "
        "(%s, %d token ids)%s; block size %d.",
        resolved.initial_tokens,
        resolved.window,
        resolved.max_separators,
        rule,
        len(resolved.separators),
        f"; layers {list(resolved.full_layers)} keep full attention" if given.full_layers else "",
        vllm_config.cache_config.block_size,
    )
