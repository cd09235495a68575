"""What sepllm does not serve, refused at start-up: what, why, what to do instead.

A row that is missing here is a silent wrong answer, so each states the reason it is wrong.
"""

import math

import vllm.config.cache as cache_config
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY
from vllm_sepllm.integration.startup import connectors, lengths
from vllm_sepllm.integration.wire.backend_name import BACKEND_NAME
from vllm_sepllm.integration.wire.fp8 import FP8_CACHE_DTYPES, converts_fp8
from vllm_sepllm.integration.wire.spec import num_staging

# vLLM's own grouping of layers into KV cache groups
_DEFAULT_GROUPING = "vllm.v1.core.kv_cache_planning.DefaultKVCacheConfigBuilder"
# drafters with caches of their own, or none
_DRAFTERS = ("ngram", "ngram_gpu", "draft_model")


def check_not_selected(engine_args: EngineArgs) -> None:
    """Refuse settings for sepllm without sepllm: they would be ignored without a word.

    Raises:
        ValueError: if ``additional_config`` has our key, or one kind of layer our name.
    """
    given = engine_args.additional_config
    if isinstance(given, dict) and ADDITIONAL_CONFIG_KEY in given:
        raise ValueError(
            'additional_config["sepllm"] is set but sepllm is not selected; add '
            "--attention-backend sepllm, or remove the setting"
        )
    _check_backend_per_kind(engine_args)


def check_engine_args(engine_args: EngineArgs) -> None:
    """Refuse what must be caught before vLLM fills in its own defaults.

    Raises:
        ValueError: naming the setting and the remedy.
    """
    _check_backend_per_kind(engine_args)
    if not isinstance(engine_args.additional_config, dict):
        raise ValueError(
            f"sepllm reads additional_config as a dict, got "
            f"{type(engine_args.additional_config).__name__}; pass a dict"
        )
    if engine_args.attention_backend is not None and engine_args.attention_config.backend:
        raise ValueError(
            "attention_backend and attention_config.backend are both set; set one of them"
        )
    if engine_args.scheduler_cls is not None:
        raise ValueError(
            f"sepllm needs its own scheduler, which knows the requests' separators, but "
            f"scheduler_cls={engine_args.scheduler_cls!r} is set; remove it or do not select sepllm"
        )
    if engine_args.worker_cls != "auto":
        raise ValueError(
            f"sepllm needs its own worker, which wraps the attention layers, but "
            f"worker_cls={engine_args.worker_cls!r} is set; remove it or do not select sepllm"
        )
    if engine_args.async_scheduling and engine_args.speculative_config is not None:
        raise ValueError(
            "sepllm does not support speculative decoding with asynchronous scheduling: the plan "
            "needs the start of the next step, which the accepted drafts decide; remove "
            "--async-scheduling, or --speculative-config"
        )
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        raise ValueError(
            f"sepllm runs on CUDA, ROCm and x86 CPUs, this is {current_platform.device_name}; "
            "serve without --attention-backend sepllm"
        )


def _check_backend_per_kind(engine_args: EngineArgs) -> None:
    if BACKEND_NAME in {b.name for b in engine_args.attention_config.backend_per_kind.values()}:
        raise ValueError(
            "sepllm cannot be a backend of one kind of layer (backend_per_kind): it needs its own "
            "scheduler; use --attention-backend sepllm, layers of other kinds are left alone"
        )


def check_vllm_config(vllm_config: VllmConfig) -> None:
    """Refuse what sepllm cannot serve exactly.

    Raises:
        ValueError: one sentence for the first reason found.
    """
    _refuse_first(
        *_model_reasons(vllm_config),
        *_speculative_reasons(vllm_config),
        *_parallel_reasons(vllm_config),
        *_cache_reasons(vllm_config),
        *connectors.reasons(vllm_config),
        *_reasons_since_0_33(vllm_config),
    )


def check_drafts(vllm_config: VllmConfig, window: int) -> None:
    """Refuse more draft tokens than can be staged beside the window of the engine's policy.

    Raises:
        ValueError: naming the remedy.
    """
    if vllm_config.speculative_config is None:
        return
    if num_staging(vllm_config) > window:
        raise ValueError(
            f"sepllm does not support {vllm_config.num_speculative_tokens} draft tokens with a "
            f"window of {window}: set num_speculative_tokens to {window // 2 - 1} or less, or a "
            "larger window"
        )


def check_offloading(engine_args: EngineArgs, vllm_config: VllmConfig) -> None:
    """Refuse what host memory for evicted checkpoints cannot do; called if there is to be any.

    Raises:
        ValueError: one sentence for the first reason found.
    """
    backend, size = engine_args.kv_offloading_backend, engine_args.kv_offloading_size
    remedy = "remove --kv-offloading-size"
    _refuse_first(
        (
            size is not None and not 0 <= size < math.inf,
            f"KV offloading of {size} GiB, which is no size of memory: set --kv-offloading-size to "
            "what may be used, or remove it",
        ),
        (
            backend != "native",
            f"KV offloading with {backend!r}, which knows blocks by the tokens in them: set "
            "--kv-offloading-backend to native",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            f"KV offloading beside a KV connector, whose failed loads it would save: {remedy}",
        ),
        (
            not vllm_config.cache_config.enable_prefix_caching,
            f"KV offloading without prefix caching, which finds what is offloaded: {remedy}",
        ),
        (
            vllm_config.parallel_config.pipeline_parallel_size > 1,
            f"KV offloading with pipeline parallelism, whose stages differ in bytes: {remedy}",
        ),
    )


def check_renumbered(vllm_config: VllmConfig, max_position: int | None) -> None:
    """Refuse what renumbered positions cannot serve exactly; layers are looked at by the worker.

    Args:
        vllm_config: of the engine.
        max_position: as the user set it.

    Raises:
        ValueError: one sentence for the first reason found.
    """
    model = vllm_config.model_config
    trained = lengths.trained_length(model)
    keep = 'set positions to "text"'
    _refuse_first(
        (
            not (current_platform.is_cpu() or vllm_config.use_v2_model_runner),
            "renumbered positions under Model Runner V1 on GPUs, where they never ran: unset "
            f"VLLM_USE_V2_MODEL_RUNNER, or {keep}",
        ),
        (
            vllm_config.speculative_config is not None,
            "renumbered positions with speculative decoding, whose drafts wait in entries that no "
            f"epoch turns: remove --speculative-config, or {keep}",
        ),
        (
            is_quantized_kv_cache(vllm_config.cache_config.cache_dtype),
            "renumbered positions with a quantised KV cache, whose keys each epoch would round "
            f"anew: remove --kv-cache-dtype, or {keep}",
        ),
        (
            model.uses_mrope,
            "renumbered positions for models with several positions a token (M-RoPE), of which "
            f"text has one alone: {keep}",
        ),
        (
            max_position is not None and trained is not None and max_position > trained,
            f"renumbered positions up to {max_position} for a model that was trained on {trained}: "
            f"set max_position to {trained} or less, or leave it out",
        ),
    )


def _refuse_first(*reasons: tuple[bool, str]) -> None:
    """Raise for the first reason that applies."""
    for is_unsupported, reason in reasons:
        if is_unsupported:
            raise ValueError(f"sepllm does not support {reason}")


def _model_reasons(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    model = vllm_config.model_config
    multimodal = model.multimodal_config
    elsewhere = "serve this model without --attention-backend sepllm"
    return [
        (
            model.runner_type != "generate",
            f"{model.runner_type} models, which read all tokens of a request once: {elsewhere}",
        ),
        (
            model.is_encoder_decoder,
            f"encoder-decoder models, whose cross attention reads every encoder token: {elsewhere}",
        ),
        (
            model.use_mla,
            f"MLA models, whose KV cache holds latents instead of keys: {elsewhere}",
        ),
        (
            model.is_hybrid or model.is_attention_free,
            f"models with recurrent state (Mamba and its like): {elsewhere}",
        ),
        (
            model.is_mm_prefix_lm,
            f"models that attend in both directions inside an image: {elsewhere}",
        ),
        (
            multimodal is not None and not multimodal.language_model_only,
            "images, audio and video, whose placeholders are no separators, so that the model "
            "would forget them as the window passes: add --language-model-only, which serves text",
        ),
        (
            model.rswa_window is not None,
            f"models with reference sliding window attention: {elsewhere}",
        ),
        (
            vllm_config.diffusion_config is not None,
            f"diffusion language models, which rewrite tokens already in the cache: {elsewhere}",
        ),
        (
            model.enable_prompt_embeds,
            "prompt embeddings, which have no token ids to find separators in: remove "
            "--enable-prompt-embeds",
        ),
        (
            envs.VLLM_BATCH_INVARIANT,
            "batch invariance: where the scheduler cuts a prompt, which other requests decide, "
            "moves the last bits of its attention: unset VLLM_BATCH_INVARIANT",
        ),
    ]


def _speculative_reasons(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    speculative = vllm_config.speculative_config
    if speculative is None:
        return []
    return [
        (
            not vllm_config.use_v2_model_runner,
            "speculative decoding under Model Runner V1, whose drafters go by token positions in "
            "the cache: remove --speculative-config"
            + ("" if current_platform.is_cpu() else ", or unset VLLM_USE_V2_MODEL_RUNNER"),
        ),
        (
            speculative.method not in _DRAFTERS,
            f"speculative decoding with {speculative.method!r}, which shares layers or states with "
            f"the model: use one of {list(_DRAFTERS)}, or remove --speculative-config",
        ),
    ]


def _parallel_reasons(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    parallel = vllm_config.parallel_config
    return [
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism, which spreads the tokens of a request by position: set "
            "--decode-context-parallel-size and --prefill-context-parallel-size to 1 and use "
            "--tensor-parallel-size",
        ),
        (
            parallel.use_ubatching,
            "splitting a batch into micro-batches: remove --enable-dbo and --ubatch-size",
        ),
        (
            envs.VLLM_USE_RUST_FRONTEND,
            "vLLM's Rust front end, which neither answers wrong requests with HTTP 400 nor shows "
            "metrics of sepllm: unset VLLM_USE_RUST_FRONTEND",
        ),
        (
            current_platform.is_cpu() and vllm_config.use_v2_model_runner,
            "vLLM's Model Runner V2 on CPU yet: unset VLLM_USE_V2_MODEL_RUNNER",
        ),
    ]


def _cache_reasons(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    cache, model = vllm_config.cache_config, vllm_config.model_config
    return [
        (
            vllm_config.aux_output_config.enabled,
            "returned routed experts, which vLLM keeps by blocks of token positions: remove "
            "--enable-return-routed-experts",
        ),
        (
            cache.kv_sharing_fast_prefill,
            "fast prefill with KV sharing: remove --kv-sharing-fast-prefill",
        ),
        (
            is_quantized_kv_cache(cache.cache_dtype)
            and (current_platform.is_cpu() or cache.cache_dtype not in FP8_CACHE_DTYPES),
            f"a KV cache in {cache.cache_dtype}: remove --kv-cache-dtype"
            + ("" if current_platform.is_cpu() else ", or set it to fp8"),
        ),
        (
            is_quantized_kv_cache(cache.cache_dtype) and not converts_fp8(),
            f"a KV cache in {cache.cache_dtype} on a GPU below compute capability 8.9, whose "
            "hardware does not convert it: remove --kv-cache-dtype",
        ),
        (
            current_platform.is_cpu()
            and kv_cache_dtype_str_to_dtype(cache.cache_dtype, model) != model.dtype,
            f"a KV cache in {cache.cache_dtype} for a model in {model.dtype}, which vLLM's CPU "
            "kernels misread: remove --kv-cache-dtype",
        ),
        (
            current_platform.is_cpu() and cache.block_size % 32 != 0,
            f"block size {cache.block_size} on CPU, whose kernels read blocks of a multiple of 32 "
            "tokens: set --block-size 32, or leave it out",
        ),
    ]


def _reasons_since_0_33(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    """What vLLM 0.33 lets models, platforms and other plugins bring, and 0.32 has no name for.

    ``ModelConfig.supports_kv_cache_grouping``, ``Platform.get_kv_cache_config_builder_cls`` and
    ``get_kv_cache_dtype_handler``: refused until one has run with sepllm.
    """
    cache_dtype = vllm_config.cache_config.cache_dtype
    # Platform.__getattr__ answers to every name, so its class is asked
    builder_of = getattr(type(current_platform), "get_kv_cache_config_builder_cls", None)
    builder = _DEFAULT_GROUPING if builder_of is None else builder_of(vllm_config)
    handler_of = getattr(cache_config, "get_kv_cache_dtype_handler", None)
    handler = None if handler_of is None else handler_of(cache_dtype)
    return [
        (
            getattr(vllm_config.model_config, "supports_kv_cache_grouping", False),
            "models that group the layers of their KV cache themselves: serve this model without "
            "--attention-backend sepllm",
        ),
        (
            builder != _DEFAULT_GROUPING,
            f"the KV cache of {builder}, which this platform brings: serve without "
            "--attention-backend sepllm",
        ),
        (
            handler is not None,
            f"a KV cache in {cache_dtype}, which another plugin brings: remove --kv-cache-dtype",
        ),
    ]
