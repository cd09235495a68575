"""Checkpoints that were trained with SepLLM, as every process knows them."""

from transformers import AutoConfig, GPTNeoXConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models import ModelRegistry

from vllm_sepllm.integration.wire.config import is_selected
from vllm_sepllm.policy import trained

ARCHITECTURE = "SepLLMGPTNeoXForCausalLM"
_MODEL = "vllm_sepllm.integration.worker.trained_model:SepLLMGPTNeoXForCausalLM"


class SepLLMGPTNeoXConfig(GPTNeoXConfig):  # type: ignore[misc]  # transformers is not type checked
    """GPT-NeoX, and as further attributes what policy/trained.py reads."""

    model_type = "sepllm_gpt_neox"


def register_model() -> None:
    """Let transformers read such a configuration, and vLLM find the model. May run again."""
    AutoConfig.register(SepLLMGPTNeoXConfig.model_type, SepLLMGPTNeoXConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, _MODEL)


def is_trained(model_config: ModelConfig) -> bool:
    """Whether the checkpoint was trained with SepLLM."""
    return isinstance(model_config.hf_config, SepLLMGPTNeoXConfig)


def check_served_as_trained(vllm_config: VllmConfig) -> None:
    """Refuse to serve such a checkpoint with full attention: it would be another model.

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
