"""Which attention layers of a loaded model become SepLLM layers."""

from collections.abc import Collection
from typing import NoReturn, cast

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionLayer, AttentionType
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_sepllm.config import ResolvedConfig
from vllm_sepllm.integration.wire.fp8 import reads_fp8


def sepllm_layers(
    vllm_config: VllmConfig, config: ResolvedConfig, *, drafting: Collection[str] = ()
) -> list[Attention]:
    """The decoder layers with plain causal full attention that ``full_layers`` does not name.

    Layers of other kinds (sliding window, chunked local, cross attention) keep vLLM's own
    attention: their cache is bounded already.

    Args:
        vllm_config: the worker's, with the model loaded.
        config: the engine's.
        drafting: names of a draft model's layers, which stay as they are.

    Raises:
        ValueError: if a layer cannot be served exactly, or if no layer is left for sepllm.
    """
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    layers = {name: layer for name, layer in layers.items() if name not in drafting}
    chosen = {name: layer for name, layer in layers.items() if _is_chosen(name, layer, config)}
    if config.max_position is not None and (others := layers.keys() - chosen.keys()):
        raise ValueError(
            f"layer {min(others)} has a window of its own, whose keys keep their positions in the "
            'text, so that sepllm cannot renumber them; set positions to "text"'
        )
    for name, layer in chosen.items():
        _check_layer(name, layer)
        # a checkpoint may ask for it layer by layer, unseen by VllmConfig
        if config.max_position is not None and is_quantized_kv_cache(layer.kv_cache_dtype):
            raise ValueError(
                f"layer {name} keeps its KV cache in {layer.kv_cache_dtype}, whose keys each epoch "
                'of renumbered positions would round anew; set positions to "text"'
            )
    for name, layer in layers.items():
        if layer.kv_sharing_target_layer_name in chosen:
            _refuse(name, "reads the KV cache of a sepllm layer, which lacks tokens that it needs")
    is_pipelined = vllm_config.parallel_config.pipeline_parallel_size > 1
    if not chosen and not is_pipelined:
        raise ValueError(
            "sepllm found no full-attention layer in this model, so it would save nothing; "
            "serve it without --attention-backend sepllm"
        )
    return list(chosen.values())


def _is_chosen(name: str, layer: Attention, config: ResolvedConfig) -> bool:
    if type(layer) is not Attention or layer.attn_type != AttentionType.DECODER:
        return False
    if layer.sliding_window is not None:
        return False
    # vLLM reads the index from the name, and cannot from every name
    return not config.full_layers or extract_layer_index(name) not in config.full_layers


def _check_layer(name: str, layer: Attention) -> None:
    if layer.kv_sharing_target_layer_name is not None:
        _refuse(name, "shares the KV of another layer, which sepllm does not support")
    # a field of every implementation that we wrap
    if layer.impl.alibi_slopes is not None:  # type: ignore[attr-defined]
        _refuse(name, "uses ALiBi, whose bias needs distances that a compact cache does not keep")
    # since vLLM 0.33: models that found it in their backend before it was wrapped (Muse Spark)
    if getattr(layer, "kv_cache_update_bypass", False):
        _refuse(name, "writes its KV cache itself, by token position")
    if layer.head_size_v != layer.head_size:
        _refuse(name, "has K and V of different head sizes, which sepllm does not support")
    # a checkpoint may ask for it layer by layer, unseen by VllmConfig
    if layer.kv_cache_torch_dtype != layer.dtype and not reads_fp8(layer.kv_cache_dtype):
        _refuse(name, f"keeps its KV cache in {layer.kv_cache_dtype}, which sepllm does not read")
    if is_quantized_kv_cache(layer.kv_cache_dtype) and not _has_scalar_scales(layer):
        _refuse(name, "has one KV scale per head, where sepllm's kernel takes one per layer")


def _has_scalar_scales(layer: Attention) -> bool:
    scaled = cast(AttentionLayer, layer)  # vLLM's protocol, which types its buffers
    return scaled._k_scale.numel() == 1 and scaled._v_scale.numel() == 1


def _refuse(name: str, reason: str) -> NoReturn:
    raise ValueError(f"layer {name} {reason}; serve this model without --attention-backend sepllm")
