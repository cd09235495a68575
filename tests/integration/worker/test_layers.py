"""Which layers of a model become SepLLM layers, and which models that makes impossible."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from tests.support.compatibility import refused
from tests.support.engine import IN_PROCESS, sepllm, started
from tests.support.refusals import check_sentence
from tests.support.tiny_models import ADDITIONAL_CONFIG, ARGUMENTS, write

pytest.importorskip("vllm")

from vllm.config import CompilationConfig, ParallelConfig
from vllm.model_executor.layers.attention import (
    Attention,
    ChunkedLocalAttention,
    CrossAttention,
    EncoderOnlyAttention,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.integration.worker.layers import sepllm_layers
from vllm_sepllm.policy.separators.definition import TokenSeparators

ELSEWHERE = "serve this model without --attention-backend sepllm"


def layer(kind: type[Attention] = Attention, **fields: Any) -> Attention:
    """A layer as vLLM leaves it after loading, without its weights and its VllmConfig."""
    made = kind.__new__(kind)
    given: dict[str, Any] = {
        "attn_type": AttentionType.DECODER,
        "sliding_window": None,
        "kv_sharing_target_layer_name": None,
        "head_size": 64,
        "head_size_v": 64,
        "dtype": torch.bfloat16,
        "kv_cache_torch_dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "impl": SimpleNamespace(alibi_slopes=None),
    }
    for name, value in (given | fields).items():
        object.__setattr__(made, name, value)
    return made


def chosen(
    layers: dict[str, Attention],
    full_layers: tuple[int, ...] = (),
    pp: int = 1,
    positions: Literal["text", "renumbered"] = "text",
) -> list:
    """Names of the layers that become SepLLM layers."""
    vllm_config: Any = SimpleNamespace(
        compilation_config=CompilationConfig(), parallel_config=ParallelConfig()
    )
    vllm_config.parallel_config.pipeline_parallel_size = pp
    vllm_config.compilation_config.static_forward_context = layers
    config = SepLLMConfig(full_layers=full_layers, positions=positions).resolve(
        separators=TokenSeparators(()),
        num_layers=99,
        max_model_len=512,
        block_size=16,
        trained_length=4096,
    )
    found = sepllm_layers(vllm_config, config)
    return [name for name, made in layers.items() if any(made is f for f in found)]


def name(index: int) -> str:
    return f"model.layers.{index}.self_attn.attn"


@pytest.mark.compatibility("Sliding-window and chunked layers", "keep vLLM's own attention")
def test_layers_of_other_kinds_keep_vllms_attention() -> None:
    layers = {
        name(0): layer(),
        name(1): layer(sliding_window=64),
        name(2): layer(ChunkedLocalAttention),
        name(3): layer(CrossAttention),
        name(4): layer(EncoderOnlyAttention),
        name(5): layer(attn_type=AttentionType.ENCODER_ONLY),
        name(6): layer(),
    }
    assert chosen(layers) == [name(0), name(6)]


@refused(
    '`positions: "renumbered"` beside sliding-window layers',
    "has a window of its own, whose keys keep their positions in the text",
    'set positions to "text"',
)
def test_layers_of_other_kinds_cannot_be_renumbered() -> None:
    layers = {name(0): layer(), name(1): layer(sliding_window=64)}
    with pytest.raises(ValueError, match="window of its own") as caught:
        chosen(layers, positions="renumbered")
    check_sentence(str(caught.value), f"layer {name(1)} has a window", 'set positions to "text"')
    assert chosen({name(0): layer()}, positions="renumbered") == [name(0)]


def test_full_layers_keep_vllms_attention() -> None:
    layers = {name(i): layer() for i in range(4)}
    assert chosen(layers, full_layers=(0, 3)) == [name(1), name(2)]


def test_names_without_one_index_are_read_only_for_full_layers() -> None:
    assert chosen({"decoder.0.attn.1": layer()}) == ["decoder.0.attn.1"]


def quantised(**fields: Any) -> dict[str, Attention]:
    """Two layers, the second with an fp8 cache."""
    scale = torch.tensor(0.5)
    fp8 = {"kv_cache_torch_dtype": torch.uint8, "kv_cache_dtype": "fp8"}
    return {
        name(0): layer(),
        name(1): layer(**(fp8 | {"_k_scale": scale, "_v_scale": scale} | fields)),
    }


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """Make vLLM say that it runs on an NVIDIA GPU."""
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cpu", lambda _self: False)
    monkeypatch.setattr(platform, "is_cuda", lambda _self: True)
    has = classmethod(lambda _cls, needed: capability >= needed)
    monkeypatch.setattr(platform, "has_device_capability", has)


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_fp8_layers_need_hardware_that_converts(
    monkeypatch: pytest.MonkeyPatch, capability: int
) -> None:
    """Triton compiles vLLM's fp8 format for 8.9 and later (tests/bench/test_compile.py)."""
    on_gpu(monkeypatch, capability)
    if capability >= 89:
        assert chosen(quantised()) == [name(0), name(1)]
        return
    with pytest.raises(ValueError, match="keeps its KV cache in fp8, which sepllm does not read"):
        chosen(quantised())


def test_quantised_layers_are_not_renumbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint may ask for them unseen by start-up."""
    on_gpu(monkeypatch, 90)
    with pytest.raises(ValueError, match="renumbered") as caught:
        chosen(quantised(), positions="renumbered")
    what = f"layer {name(1)} keeps its KV cache in fp8, whose keys each epoch"
    check_sentence(str(caught.value), what, 'set positions to "text"')


@pytest.mark.parametrize("which", ["_k_scale", "_v_scale"])
def test_one_scale_per_head_is_refused(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """compressed-tensors loads such checkpoints for FlashAttention; the kernel takes scalars."""
    on_gpu(monkeypatch, 90)
    with pytest.raises(
        ValueError, match=f"^layer {name(1)} has one KV scale per head.*{ELSEWHERE}"
    ):
        chosen(quantised(**{which: torch.ones(8)}))
    assert chosen(quantised(**{which: torch.ones(1)})) == [name(0), name(1)]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"kv_sharing_target_layer_name": "x"}, "shares the KV of another layer"),
        ({"impl": SimpleNamespace(alibi_slopes=torch.ones(2))}, "uses ALiBi, whose bias needs"),
        ({"head_size_v": 32}, "has K and V of different head sizes"),
        ({"kv_cache_update_bypass": True}, "writes its KV cache itself, by token position"),
        (
            {"kv_cache_torch_dtype": torch.uint8, "kv_cache_dtype": "fp8"},
            "keeps its KV cache in fp8, which sepllm does not read",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layer_that_cannot_be_exact_is_refused(wrong: dict[str, Any], reason: str) -> None:
    layers = {name(0): layer(), name(1): layer(**wrong)}
    with pytest.raises(ValueError, match=f"^layer {name(1)} {reason}.*; {ELSEWHERE}$"):
        chosen(layers)
    # it may stay as it is
    assert chosen(layers, full_layers=(1,)) == [name(0)]


def test_full_layer_that_reads_a_sepllm_cache_is_refused() -> None:
    layers = {name(0): layer(), name(1): layer(kv_sharing_target_layer_name=name(0))}
    with pytest.raises(ValueError, match=r"1\.self_attn\.attn reads the KV cache of a sepllm"):
        chosen(layers, full_layers=(1,))


def test_sliding_layers_may_share_their_cache() -> None:
    layers = {
        name(0): layer(),
        name(1): layer(sliding_window=64),
        name(2): layer(sliding_window=64, kv_sharing_target_layer_name=name(1)),
    }
    assert chosen(layers) == [name(0)]


def test_model_without_full_attention_is_refused() -> None:
    layers = {name(0): layer(sliding_window=64)}
    with pytest.raises(ValueError, match="no full-attention layer"):
        chosen(layers)
    # the others may be on other ranks
    assert chosen(layers, pp=2) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "policy", "reason"),
    [
        pytest.param(
            *("bloom", {}, "transformer.h.0.self_attention.attn uses ALiBi"),
            marks=refused("ALiBi (Bloom)", "uses ALiBi, whose bias needs distances", ELSEWHERE),
        ),
        pytest.param(
            *("mistral", {}, "no full-attention layer in this model"),
            marks=refused(
                "Sliding windows in every layer", "found no full-attention layer", ELSEWHERE
            ),
        ),
        pytest.param(
            *("gemma3n", {}, "model.layers.3.self_attn.attn shares the KV of another layer"),
            marks=refused(
                "Full layers that share KV (Gemma-3n)", "shares the KV of another layer", ELSEWHERE
            ),
        ),
        ("gemma3n", {"full_layers": [3]}, "model.layers.3.self_attn.attn reads the KV cache of"),
    ],
)
def test_engine_does_not_start(
    kind: str, policy: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Real models whose layers, not whose configuration, are in the way: LLM() raises."""
    selected = sepllm(**ADDITIONAL_CONFIG["sepllm"] | policy)
    given = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 24}
    model = str(write(kind, tmp_path))
    with (
        pytest.raises(ValueError, match=reason),
        started(IN_PROCESS, model=model, **ARGUMENTS, **selected, **given),
    ):
        pytest.fail("it started")
