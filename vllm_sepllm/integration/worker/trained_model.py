"""GPT-NeoX as the authors' checkpoints name its weights, through vLLM's Transformers backend."""

from collections.abc import Iterable

import torch
from transformers import AutoModel, GPTNeoXModel
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

from vllm_sepllm.integration.wire.trained_config import SepLLMGPTNeoXConfig, check_served_as_trained

_RENAMED = WeightsMapper(
    orig_to_new_prefix={"sepllm_gpt_neox.": "gpt_neox.", "embed_out.": "lm_head."}
)


class SepLLMGPTNeoXModel(GPTNeoXModel):  # type: ignore[misc]  # transformers is not type checked
    """The decoder that transformers builds for such a configuration."""

    config_class = SepLLMGPTNeoXConfig


AutoModel.register(SepLLMGPTNeoXConfig, SepLLMGPTNeoXModel, exist_ok=True)


class SepLLMGPTNeoXForCausalLM(TransformersForCausalLM):
    """vLLM serves GPT-NeoX this way too; which keys are read is the attention backend's part."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # an engine may have been put together without EngineArgs, which checks it first
        check_served_as_trained(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """See the base class; the names become those of GPT-NeoX first."""
        loaded: set[str] = super().load_weights(_RENAMED.apply(weights))
        return loaded
