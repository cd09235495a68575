"""vLLM names that checkpoints trained with SepLLM rely on (see contracts.py)."""

from vllm_sepllm.integration.contracts.contract import Contract

_TRANSFORMERS = "vllm.model_executor.models.transformers"

TRAINED = (
    Contract(
        "vllm.model_executor.models.registry:_ModelRegistry.register_model",
        "called: SepLLMGPTNeoXForCausalLM by its path",
        ("model_arch", "model_cls"),
    ),
    Contract(f"{_TRANSFORMERS}:TransformersForCausalLM", "base class of that model"),
    Contract(
        f"{_TRANSFORMERS}.causal:CausalMixin.load_weights",
        "overridden: renames the weights",
        ("weights",),
    ),
    Contract(
        f"{_TRANSFORMERS}.base:Base.__init__",
        "overridden: refuses full attention",
        ("vllm_config", "prefix"),
    ),
)
