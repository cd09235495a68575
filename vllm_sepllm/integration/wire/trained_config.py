"""Checkpoints that were trained with SepLLM: their configuration, and the policy they imply."""

from dataclasses import asdict
from typing import Any

from transformers import AutoConfig, GPTNeoXConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY, SepLLMConfig
from vllm_sepllm.policy import trained

# vLLM logs through the handlers of the logger "vllm"; ours must be its child to be seen
logger = init_logger("vllm.plugins.sepllm")

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
    additional_config = vllm_config.additional_config
    # written by the selection, whatever the user gave
    is_selected = isinstance(additional_config, dict) and ADDITIONAL_CONFIG_KEY in additional_config
    if not is_selected and not trained.is_full_attention(fields):
        raise ValueError(
            "this checkpoint was trained with SepLLM, and full attention would make another model "
            "of it; add --attention-backend sepllm"
        )


def with_trained_policy(given: SepLLMConfig, model_config: ModelConfig) -> SepLLMConfig:
    """``given``, completed from the checkpoint; what the user wrote wins, with a warning.

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
