"""The attention backend of SepLLM layers: the one that vLLM chose for them, wrapped."""

from functools import cache
from typing import Any

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.integration.worker.builder import BuilderMixin
from vllm_sepllm.policy.visibility import Policy


@cache
def wrap_backend(
    wrapped: type[AttentionBackend], mixin: type[BuilderMixin], policy: Policy
) -> type[AttentionBackend]:
    """``wrapped`` with our metadata and cache spec; its name, block sizes and layouts stay.

    A class per policy, because vLLM passes no configuration to ``customize_spec``.
    """
    builder = wrap_builder(wrapped.get_builder_cls(), mixin)  # type: ignore[no-untyped-call]

    def customize_spec(cls: type[AttentionBackend], spec: AttentionSpec) -> AttentionSpec:
        """The spec that vLLM and the wrapped backend made for the layer, under our policy."""
        if isinstance(spec, SepLLMSpec):
            return spec
        spec = wrapped.customize_spec(spec)
        assert type(spec) is FullAttentionSpec, f"not a full-attention layer: {spec}"
        return SepLLMSpec.from_full_attention(spec, policy)

    members = {
        "get_builder_cls": staticmethod(lambda: builder),
        "customize_spec": classmethod(customize_spec),
        # prefill attends before it writes, and writes only what is kept
        "forward_includes_kv_cache_update": True,
        # since vLLM 0.33: a model may write keys and values into the cache itself, by position
        "supports_kv_cache_update_bypass": False,
        "__module__": __name__,
    }
    return type(f"SepLLM{wrapped.__name__}", (wrapped,), members)


@cache
def wrap_builder(wrapped: Any, mixin: type[BuilderMixin]) -> type[BuilderMixin]:
    """The wrapped backend's metadata builder, behind the mixin of a platform."""
    return type(f"SepLLM{wrapped.__name__}", (mixin, wrapped), {"__module__": __name__})
