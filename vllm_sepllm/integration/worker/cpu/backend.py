"""The backend of SepLLM layers on CPU: vLLM's own, wrapped."""

from typing import ClassVar

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.integration.worker.cpu.builder import SepLLMCPUMetadataBuilder
from vllm_sepllm.integration.worker.cpu.impl import SepLLMCPUImpl
from vllm_sepllm.policy.visibility import Policy


class SepLLMCPUBackend(CPUAttentionBackend):
    """Block sizes, head sizes and cache layout are vLLM's; specs and metadata are ours."""

    # prefill attends before it writes, and writes only what is kept
    forward_includes_kv_cache_update = True
    policy: ClassVar[Policy]

    @classmethod
    def with_policy(cls, policy: Policy) -> type["SepLLMCPUBackend"]:
        """A backend class for ``policy``: vLLM passes no configuration to customize_spec."""
        return type(cls.__name__, (cls,), {"policy": policy, "__module__": cls.__module__})

    @staticmethod
    def get_name() -> str:
        """The name in ``AttentionBackendEnum``."""
        return "SEPLLM"

    @staticmethod
    def get_impl_cls() -> type[SepLLMCPUImpl]:  # type: ignore[override]  # wraps, not inherits
        """The implementation that :class:`SepLLMCPUWorker` puts around vLLM's."""
        return SepLLMCPUImpl

    @staticmethod
    def get_builder_cls() -> type[SepLLMCPUMetadataBuilder]:
        """The metadata builder."""
        return SepLLMCPUMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The spec vLLM made for the layer, under our policy (vLLM: both model runners)."""
        if isinstance(spec, SepLLMSpec):
            return spec
        assert type(spec) is FullAttentionSpec, f"not a full-attention layer: {spec}"
        return SepLLMSpec.from_full_attention(spec, cls.policy)
