"""Which attention layers of a loaded model become SepLLM layers."""

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from vllm_sepllm.config import SepLLMConfig


def sepllm_layers(vllm_config: VllmConfig, config: SepLLMConfig) -> list[Attention]:
    """The decoder layers with plain causal full attention that ``full_layers`` does not name.

    Layers of other kinds (sliding window, chunked local, cross attention) keep vLLM's own
    attention: their cache is bounded already.

    Args:
        vllm_config: the worker's, with the model loaded.
        config: resolved.

    Raises:
        ValueError: if a layer cannot be served exactly, or if no layer is left for sepllm.
    """
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    chosen = []
    for name, layer in layers.items():
        if type(layer) is not Attention or layer.attn_type != AttentionType.DECODER:
            continue
        if layer.sliding_window is not None or extract_layer_index(name) in config.full_layers:
            continue
        _check_layer(name, layer)
        chosen.append(layer)
    is_pipelined = vllm_config.parallel_config.pipeline_parallel_size > 1
    if not chosen and not is_pipelined:
        raise ValueError(
            "sepllm found no full-attention layer in this model, so it would save nothing; "
            "serve it without --attention-backend sepllm"
        )
    return chosen


def _check_layer(name: str, layer: Attention) -> None:
    reason = None
    if layer.kv_sharing_target_layer_name is not None:
        reason = "shares the KV of another layer, which sepllm does not support"
    elif getattr(layer.impl, "alibi_slopes", None) is not None:
        reason = "uses ALiBi, whose bias needs the distance that a compact cache no longer has"
    elif layer.head_size_v != layer.head_size:
        reason = "has K and V of different head sizes, which sepllm does not support"
    if reason is not None:
        raise ValueError(f"layer {name} {reason}; serve this model without sepllm")
