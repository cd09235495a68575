"""The policy of a checkpoint that was trained with SepLLM, beside what the user set."""

from dataclasses import asdict
from typing import Any

from vllm.config import ModelConfig

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY, SepLLMConfig
from vllm_sepllm.integration.log import logger
from vllm_sepllm.integration.wire.trained_config import is_trained
from vllm_sepllm.policy import trained


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
