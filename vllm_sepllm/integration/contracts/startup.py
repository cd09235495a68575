"""Names of start-up that types do not show, or that we write."""

from vllm_sepllm.integration.contracts.contract import by_hand

CONTRACTS = by_hand(
    {
        "vllm.engine.arg_utils:EngineArgs": {
            "create_engine_config": "wrapped: every way to start an engine passes it",
            "attention_backend: AttentionBackendEnum | None": "hidden from vLLM meanwhile",
            "attention_config: AttentionConfig": "its backend is hidden from vLLM meanwhile",
            "block_size: int | None": "filled in on CPUs",
            "async_scheduling: bool | None": "switched off for speculative decoding",
        },
        "vllm.config.cache:CacheConfig": {
            "DEFAULT_BLOCK_SIZE: ClassVar[int]": "read: blocks on GPUs, for `plan`",
        },
        "vllm.config.scheduler:SchedulerConfig": {
            "scheduler_cls: str | type[object] | None": "becomes ours, by its path",
            "disable_hybrid_kv_cache_manager: bool | None": "switched back off",
        },
        "vllm.config.parallel:ParallelConfig": {"worker_cls: str": "becomes ours, by its path"},
        "vllm.config.vllm:VllmConfig": {
            "additional_config: dict | SupportsHash": "carries our configuration to every process",
        },
        "vllm.config.model:ModelConfig": {
            "get_and_verify_max_len(max_model_len)": (
                "wrapped: requests may exceed the trained length if positions are renumbered"
            ),
            "model_arch_config, hf_text_config": "read: the trained length",
        },
        "vllm.platforms.cpu:CpuPlatform": {
            "get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)": (
                "wrapped: it ignores the backend's name; the first argument is ours"
            ),
        },
        "vllm.platforms.interface:Platform": {
            "device_name, is_cpu, is_cuda_alike, is_rocm": (
                "read; its __getattr__ answers to every name, so types tell nothing"
            ),
        },
    }
)
