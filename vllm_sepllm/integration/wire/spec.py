"""The KV cache of a SepLLM layer, as vLLM's block accounting sees it."""

import dataclasses
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from vllm_sepllm.policy.layout import max_compact_length
from vllm_sepllm.policy.step import staging
from vllm_sepllm.policy.visibility import Policy

_MANAGER = "vllm_sepllm.integration.scheduler.manager:SepLLMManager"

# vLLM 0.32 registers its own specs on first use, and only while its table is empty: a plugin that
# comes first would leave every built-in spec without a manager.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})


class _ManagerByName(SingleTypeKVCacheManager):
    """Makes a SepLLMManager.

    vLLM's registry wants the manager's class in every process that has the spec, workers included,
    and only the scheduler makes one; so no other process loads the manager's module. Of the class
    itself vLLM reads nothing that SepLLMManager overrides.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> SingleTypeKVCacheManager:  # type: ignore[misc]
        """The manager, which is no instance of this class."""
        manager: SingleTypeKVCacheManager = resolve_name(_MANAGER)(*args, **kwargs)
        return manager


# Not a FullAttentionSpec: FullAttentionSpec.merge accepts subclasses and drops their fields, so a
# model with full_layers would silently become one full-attention group.
@register_kv_cache_spec(manager_class=_ManagerByName)
@dataclass(frozen=True, kw_only=True)
class SepLLMSpec(AttentionSpec):
    """A layer that holds the compact entries of each request (policy/layout.py).

    Attributes:
        policy: a, n and s of the request that can hold most: a is the most initial tokens that a
            request has unless it asks for more; s is a number.
    """

    policy: Policy

    @classmethod
    def from_full_attention(cls, spec: FullAttentionSpec, policy: Policy) -> Self:
        """The same layer under the SepLLM rule."""
        kept = {
            field.name: getattr(spec, field.name) for field in dataclasses.fields(AttentionSpec)
        }
        return cls(**kept, policy=policy)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of this layer that the longest request needs if every token is a separator."""
        longest = max_compact_length(self.policy, vllm_config.model_config.max_model_len)
        longest += num_staging(vllm_config)
        return cdiv(longest, self.block_size) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Width of the block table: staging of a short request can pass its own length.

        With renumbered positions no request keeps more entries than there are positions.
        """
        most = max_len if self.policy.max_position is None else self.policy.max_position
        longest = min(max_len, most) + num_staging(vllm_config)
        return super().max_num_blocks_per_req(vllm_config, longest)

    @property
    def uses_slot_mapping(self) -> bool:
        """False: vLLM's slot mapping goes by token position, past the end of a compact row."""
        return False


def num_staging(vllm_config: VllmConfig) -> int:
    """Entries of each request beyond its compact length, where drafts wait."""
    return staging.num_entries(max_proposed(vllm_config))


def max_proposed(vllm_config: VllmConfig) -> int:
    """Most tokens that a step of speculative decoding proposes, the certain one included; or 0."""
    if vllm_config.speculative_config is None:
        return 0
    return 1 + vllm_config.num_speculative_tokens
