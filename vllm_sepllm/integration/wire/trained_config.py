"""Models that were trained with SepLLM: their configuration, in every process."""

from transformers import AutoConfig, GPTNeoXConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models import ModelRegistry

from vllm_sepllm.integration.wire.config import is_selected
from vllm_sepllm.policy import trained

ARCHITECTURE = "SepLLMGPTNeoXForCausalLM"
_MODEL = "vllm_sepllm.integration.worker.trained_model:SepLLMGPTNeoXForCausalLM"


class SepLLMGPTNeoXConfig(GPTNeoXConfig):  # type: ignore[misc]  # transformers is not type checked
    """GPT-NeoX's configuration, and the fields that policy/trained.py reads."""

    model_type = "sepllm_gpt_neox"


def register_model() -> None:
    """Let transformers read such a configuration, and vLLM find the model. May run again."""
    AutoConfig.register(SepLLMGPTNeoXConfig.model_type, SepLLMGPTNeoXConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, _MODEL)


def is_trained(model_config: ModelConfig) -> bool:
    """Whether the model was trained with SepLLM."""
    return isinstance(model_config.hf_config, SepLLMGPTNeoXConfig)


def check_served_as_trained(vllm_config: VllmConfig) -> None:
    """Refuse full attention for a model trained with SepLLM: it would be another model.

    Raises:
        ValueError: one sentence.
    """
    hf_config = vllm_config.model_config.hf_config
    if not isinstance(hf_config, SepLLMGPTNeoXConfig):
        return
    fields = hf_config.to_dict()
    trained.check_architecture(fields)
    if not is_selected(vllm_config) and not trained.is_full_attention(fields):
        raise ValueError(
            "this checkpoint was trained with SepLLM, and full attention would make another model "
            "of it; add --attention-backend sepllm"
        )
