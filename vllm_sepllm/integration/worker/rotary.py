"""Rotary embeddings of a loaded model: how the keys of each layer turn, and proof that they do."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from vllm_sepllm.ops.rotation import KeyRotation

# tokens of the proof
_NUM_TOKENS = 16
# bfloat16 tables and keys part by a hundredth; keys without a rotation, or with more than one, by
# as much as they are long
_TOLERANCE = 0.05


def renumber(
    runner: Any, vllm_config: VllmConfig, layers: Sequence[Attention], max_position: int
) -> None:
    """Tell each of ``layers`` how its keys turn, and prove on the loaded model that they do.

    Args:
        runner: a model runner, with the model.
        vllm_config: the worker's.
        layers: of sepllm.
        max_position: L.

    Raises:
        ValueError: naming a layer whose keys do not turn with their positions.
    """
    found = rotations(runner, layers, max_position)
    for layer, rotation in zip(layers, found, strict=True):
        impl: Any = layer.impl
        impl.rotation = rotation
    check_rotations(runner, vllm_config, layers, max_position)


def rotations(runner: Any, layers: Sequence[Attention], max_position: int) -> list[KeyRotation]:
    """How the keys of each of ``layers`` turn.

    Raises:
        ValueError: if a layer's keys are not rotated by one table of vLLM's.
    """
    modules = runner.model.modules()
    parents = {id(child): parent for parent in modules for child in parent.children()}
    known: dict[int, KeyRotation] = {}
    found = []
    for layer in layers:
        beside = parents[id(layer)].children() if id(layer) in parents else iter(())
        tables = [module for module in beside if isinstance(module, RotaryEmbeddingBase)]
        if len(tables) != 1:
            _refuse(layer, f"has {len(tables)} rotary embeddings of vLLM's beside it, not one")
        (table,) = tables
        if id(table) not in known:
            known[id(table)] = _rotation(layer, table, max_position, runner.device)
        found.append(known[id(table)])
    return found


def _rotation(
    layer: Attention, table: RotaryEmbeddingBase, max_position: int, device: torch.device
) -> KeyRotation:
    # the model's table is rounded to its dtype, with which a turned key would grow or shrink
    with device:  # as vLLM loads a model
        angles = table._compute_cos_sin_cache().float()
    cos, sin = angles[:max_position].chunk(2, dim=1)
    if len(cos) < max_position:
        _refuse(layer, f"has a rotary table of {len(cos)} positions, not of {max_position}")
    scale = cos[0, 0].clone()  # YaRN's mscale, which keys have once already
    return KeyRotation(cos / scale, sin / scale, table.is_neox_style)


@torch.inference_mode()
def check_rotations(
    runner: Any, vllm_config: VllmConfig, layers: Sequence[Attention], max_position: int
) -> None:
    """Prove on the loaded model that keys at other positions are keys that were turned.

    The model runs twice over the same tokens without requests, so that attention adds nothing and
    layers differ by positions alone: what else a model does with positions shows in its keys.

    Raises:
        ValueError: naming the layer whose keys are others.
    """
    near = torch.arange(_NUM_TOKENS, device=runner.device)
    delta = -(max_position - _NUM_TOKENS)
    keys = [_keys(runner, vllm_config, layers, positions) for positions in (near - delta, near)]
    for layer, before, after in zip(layers, *keys, strict=True):
        shape = (_NUM_TOKENS, layer.num_kv_heads, layer.head_size)
        turned = layer.impl.rotation.turned(before.view(shape), torch.full_like(near, delta))
        error = (turned.float() - after.view(shape).float()).norm() / after.float().norm()
        if not error <= _TOLERANCE:
            _refuse(layer, f"has keys that do not turn with their positions (error {error:.2f})")


def _keys(
    runner: Any, vllm_config: VllmConfig, layers: Sequence[Attention], positions: torch.Tensor
) -> list[torch.Tensor]:
    """The keys of each layer for some tokens at ``positions``."""
    keys: dict[str, torch.Tensor] = {}
    inputs: dict[str, Any] = {"input_ids": torch.arange(2, 2 + _NUM_TOKENS, device=runner.device)}
    first = getattr(runner.model, "make_empty_intermediate_tensors", None)
    if first is not None and vllm_config.parallel_config.pipeline_parallel_size > 1:
        inputs["intermediate_tensors"] = _hidden_states(runner, first)
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_captured(layer, keys))
        stack.enter_context(
            set_forward_context(None, vllm_config, num_tokens=_NUM_TOKENS, skip_compiled=True)
        )
        runner.model(positions=positions.clone(), **inputs)
    return [keys[layer.layer_name] for layer in layers]


def _hidden_states(runner: Any, make: Any) -> Any:
    """What a pipeline stage before this one might send; None for the first."""
    from vllm.distributed.parallel_state import get_pp_group

    if get_pp_group().is_first_rank:
        return None
    made = make(_NUM_TOKENS, runner.model_config.dtype, runner.device)
    pick = torch.Generator(runner.device).manual_seed(0)
    for tensor in made.tensors.values():
        tensor.normal_(generator=pick)
    return made


@contextmanager
def _captured(layer: Attention, keys: dict[str, torch.Tensor]) -> Iterator[None]:
    """Note the layer's keys while it runs."""
    impl: Any = layer.impl
    original = impl.forward

    def forward(layer: Any, query: Any, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys[layer.layer_name] = key.clone()
        return original(layer, query, key, *args, **kwargs)

    impl.forward = forward
    try:
        yield
    finally:
        del impl.forward


def _refuse(layer: Attention, reason: str) -> NoReturn:
    raise ValueError(
        f"layer {layer.layer_name} {reason}, so that sepllm cannot renumber its positions; set "
        'positions to "text"'
    )
