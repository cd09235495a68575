"""Arithmetic on a Hugging Face config: what the KV cache of a request takes. No measurement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_sepllm.cli.unreadable import unreadable
from vllm_sepllm.config import ResolvedConfig
from vllm_sepllm.policy.layout import compact_length

DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
_WINDOW_KINDS = ("sliding_attention", "chunked_attention")
# checkpoints of the authors' trained models
_TRAINED = "sepllm_gpt_neox"
# fields that change what a layer caches, and what they mean
_UNLIKE = {
    "kv_lora_rank": "caches latents instead of keys (MLA)",
    "is_encoder_decoder": "is an encoder-decoder model",
    "num_kv_shared_layers": "shares KV between layers",
    "global_head_dim": "has layers of different head sizes",
    "cross_attention_layers": "has cross attention",
    "attn_layer_indices": "has recurrent layers",
    "layers_block_type": "has recurrent layers",
}


@dataclass(frozen=True, slots=True)
class KVShape:
    """What of a model's config decides the size of its KV cache.

    Attributes:
        full: indices of the layers with ordinary full attention, which sepllm can serve.
        sliding: number of the layers with a window of the model's own, which stay as they are.
        sliding_window: tokens of that window; 0 without such layers.
        num_layers: all layers.
        num_kv_heads: of the whole model.
        head_size: of K and of V.
        dtype: the model's.
        max_positions: longest context the config names; 0 if it names none.
    """

    full: tuple[int, ...]
    sliding: int
    sliding_window: int
    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: str
    max_positions: int


def load_shape(model: str) -> KVShape:
    """The shape of a model folder, or of a name in the Hugging Face cache.

    Raises:
        ValueError: in one line, if there is none, or settings are not for the user to choose.
    """
    from transformers import AutoConfig, PretrainedConfig

    try:
        # before AutoConfig, which knows this kind of model with the plugin alone
        given, _ = PretrainedConfig.get_config_dict(model)
        if given.get("model_type") == _TRAINED:
            raise ValueError(
                "it was trained with SepLLM, so its policy is in its config.json; ask "
                "`vllm-sepllm doctor` with which settings it is served"
            )
        return read_shape(AutoConfig.from_pretrained(model))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = unreadable(model, "config.json") or str(error).partition("\n")[0]
        raise ValueError(reason) from None


def read_shape(config: Any) -> KVShape:
    """The shape in a config as ``transformers.AutoConfig`` returns it.

    Raises:
        ValueError: if the KV cache of the model is not that of ordinary attention.
    """
    text = config.get_text_config()
    for name, meaning in _UNLIKE.items():
        if getattr(config, name, None) or getattr(text, name, None):
            raise ValueError(
                f"{config.model_type} {meaning}, which this arithmetic does not cover; "
                "ask `vllm-sepllm doctor` whether sepllm serves it"
            )
    num_heads = _first(text, "num_attention_heads")
    hidden_size, num_layers = _first(text, "hidden_size"), _first(text, "num_hidden_layers")
    if not (num_heads and hidden_size and num_layers):
        raise ValueError(f"{config.model_type} names no attention heads; is it a decoder?")
    kinds = _layer_kinds(text, num_layers)
    unknown = sorted(set(kinds) - {"full_attention", *_WINDOW_KINDS})
    if unknown:
        raise ValueError(f"{config.model_type} has layers that sepllm does not serve: {unknown}")
    has_window = set(kinds) != {"full_attention"}
    return KVShape(
        full=tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
        sliding=sum(kind in _WINDOW_KINDS for kind in kinds),
        sliding_window=_first(text, "sliding_window", "attention_chunk_size") if has_window else 0,
        num_layers=num_layers,
        num_kv_heads=_num_kv_heads(text, num_heads),
        head_size=_first(text, "head_dim") or hidden_size // num_heads,
        dtype=str(getattr(text, "dtype", None) or "bfloat16").removeprefix("torch."),
        max_positions=_first(text, "max_position_embeddings"),
    )


def _first(config: Any, *names: str) -> int:
    """The first of the fields that is there and not 0 or None, else 0."""
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


def _layer_kinds(text: Any, num_layers: int) -> list[str]:
    """The kind of each layer, in transformers' words."""
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return list(kinds)
    uses_window = getattr(text, "sliding_window", None) and getattr(
        text, "use_sliding_window", True
    )
    return ["sliding_attention" if uses_window else "full_attention"] * num_layers


def _num_kv_heads(text: Any, num_heads: int) -> int:
    """KV heads, with Falcon's multi-query flag as vLLM reads it."""
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    names = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num")
    return _first(text, *names) or num_heads


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where the model runs.

    Attributes:
        kv_memory: bytes for the KV cache on each device.
        context: tokens of each request.
        tensor_parallel: devices that share the KV heads.
        dtype: of the KV cache.
        block_size: tokens of a block.
    """

    kv_memory: int
    context: int
    tensor_parallel: int
    dtype: str
    block_size: int

    def layer_block_bytes(self, shape: KVShape) -> int:
        """Bytes of one block of one layer on one device: K and V.

        Raises:
            ValueError: if the KV heads cannot be shared out.
        """
        num_kv_heads, num_devices = shape.num_kv_heads, self.tensor_parallel
        if num_kv_heads % num_devices and num_devices % num_kv_heads:
            raise ValueError(
                f"--tensor-parallel {num_devices} does not go with {num_kv_heads} KV heads"
            )
        heads = max(1, num_kv_heads // num_devices)  # fewer heads than devices: vLLM copies them
        return 2 * heads * shape.head_size * DTYPE_BYTES[self.dtype] * self.block_size


@dataclass(frozen=True, slots=True)
class Estimate:
    """The KV cache of one request, on each device.

    Attributes:
        entries: tokens that a layer with sepllm (or, without it, with full attention) holds.
        request_bytes: all layers, in whole blocks.
        concurrent: requests of this size that the memory holds.
    """

    entries: int
    request_bytes: int
    concurrent: int


def estimate(
    shape: KVShape, deployment: Deployment, config: ResolvedConfig | None, density: float
) -> Estimate:
    """The cache of a request that is as long as the deployment's context.

    Args:
        shape: the model's.
        deployment: where it runs.
        config: the engine's; None is full attention.
        density: share of separators among the tokens that left the window; 1 is the worst case.
    """
    context = deployment.context
    entries, full_layers = context, shape.full
    if config is not None:
        num_left = max(0, context - config.policy.num_dense)
        entries = compact_length(config.policy, context, round(num_left * density))
        full_layers = tuple(i for i in shape.full if i in config.full_layers)
    num_blocks = _blocks(deployment, context) * len(full_layers)
    num_blocks += _blocks(deployment, entries) * (len(shape.full) - len(full_layers))
    num_blocks += _window_blocks(shape, deployment) * shape.sliding
    request_bytes = num_blocks * deployment.layer_block_bytes(shape)
    return Estimate(entries, request_bytes, deployment.kv_memory // request_bytes)


def _blocks(deployment: Deployment, num_tokens: int) -> int:
    return -(-num_tokens // deployment.block_size)


def _window_blocks(shape: KVShape, deployment: Deployment) -> int:
    """Blocks of a layer with a window of its own, which rarely starts at a block's edge."""
    if deployment.context <= shape.sliding_window:
        return _blocks(deployment, deployment.context)
    return _blocks(deployment, shape.sliding_window) + 1


def check_layers(shape: KVShape, full_layers: Sequence[int]) -> None:
    """Refuse a choice that leaves sepllm nothing to do.

    Raises:
        ValueError: if the model has no layer with full attention besides ``full_layers``.
    """
    if not set(shape.full) - set(full_layers):
        raise ValueError(
            "no layer with full attention is left for sepllm, so it would save nothing; serve "
            "this model without --attention-backend sepllm"
        )
