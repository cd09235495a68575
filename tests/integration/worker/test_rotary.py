"""Which models' keys can be renumbered, asked of the loaded model itself."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.refusals import check_sentence
from tests.support.tiny_models import ADDITIONAL_CONFIG, ARGUMENTS, write

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_sepllm.integration.worker import rotary

HEADS, SIZE, LENGTH = 2, 64, 300
REMEDY = 'set positions to "text"'


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    path = write("llama", tmp_path_factory.mktemp("llama"))
    selected = {"attention_backend": "sepllm", "additional_config": ADDITIONAL_CONFIG}
    made = EngineArgs(model=str(path), **(ARGUMENTS | selected)).create_engine_config()
    with set_current_vllm_config(made):
        yield made


def table(**parameters: Any) -> nn.Module:
    """One of vLLM's rotary embeddings."""
    given = {"rope_type": "default", "rope_theta": 1e4} | parameters
    return get_rope(SIZE, max_position=LENGTH, rope_parameters=given, dtype=torch.float32)


Keys = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def rotated(rope: nn.Module, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What nearly every model does."""
    return rope.forward_native(positions, keys.clone(), keys.clone())[1]


class Impl:
    """An implementation of attention that does nothing."""

    rotation: Any = None

    def forward(self, *_: Any) -> None:
        return None


class Layer(nn.Module):
    """An attention layer as the proof sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_name, self.num_kv_heads, self.head_size = "layers.0.attn", HEADS, SIZE
        self.impl = Impl()


class Model(nn.Module):
    """One layer with rotary embeddings beside it; ``keys`` makes its keys."""

    def __init__(self, keys: Keys, *ropes: nn.Module) -> None:
        super().__init__()
        self.inside = nn.ModuleList([Layer(), *ropes])
        self._keys = keys

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        keys = torch.randn(len(input_ids), HEADS * SIZE, generator=torch.Generator().manual_seed(0))
        layer, rope = self.inside[0], self.inside[1]
        keys = self._keys(rope, positions, keys)
        layer.impl.forward(layer, keys, keys, keys)


def check(vllm_config: VllmConfig, model: Model, length: int = LENGTH) -> None:
    layer: Any = model.inside[0]
    runner = SimpleNamespace(model=model, device=torch.device("cpu"))
    (layer.impl.rotation,) = rotary.rotations(runner, [layer], length)
    rotary.check_rotations(runner, vllm_config, [layer], length)
    assert "forward" not in vars(layer.impl), "it is put back"


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"partial_rotary_factor": 0.5},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": LENGTH,
        },
    ],
    ids=str,
)
def test_rotary_embeddings_that_turn(vllm_config: VllmConfig, parameters: dict[str, Any]) -> None:
    """Proves it for the kinds that scale angles or keys, YaRN's mscale among them."""
    check(vllm_config, Model(rotated, table(**parameters)))


def unrotated(_rope: nn.Module, _positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """NoPE, with a rotary embedding that other layers use."""
    return keys


def weighted(rope: nn.Module, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """A norm with weights behind the rotation."""
    return rotated(rope, positions, keys) * torch.linspace(0.5, 1.5, keys.shape[1])


def placed(rope: nn.Module, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """An embedding of absolute positions besides."""
    return rotated(rope, positions, keys + (positions[:, None] * 0.1).sin())


def interleaved(rope: nn.Module, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """A rotation of other pairs than its table says."""
    pairs = keys.unflatten(1, (HEADS, SIZE // 2, 2)).transpose(2, 3).flatten(1)
    return (
        rotated(rope, positions, pairs)
        .unflatten(1, (HEADS, 2, SIZE // 2))
        .transpose(2, 3)
        .flatten(1)
    )


@pytest.mark.parametrize("keys", [unrotated, weighted, placed, interleaved])
def test_keys_that_do_not_turn_are_refused(vllm_config: VllmConfig, keys: Keys) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.attn") as caught:
        check(vllm_config, Model(keys, table()))
    check_sentence(str(caught.value), "has keys that do not turn with their positions", REMEDY)


def test_layers_without_one_table_are_refused(vllm_config: VllmConfig) -> None:
    for ropes, number in (((nn.Identity(),), 0), ((table(), table(rope_theta=2e4)), 2)):
        with pytest.raises(ValueError, match=r"layers\.0\.attn") as caught:
            check(vllm_config, Model(rotated, *ropes))
        what = f"has {number} rotary embeddings of vLLM's beside it, not one"
        check_sentence(str(caught.value), what, REMEDY)


def test_a_table_that_ends_too_early_is_refused(vllm_config: VllmConfig) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.attn") as caught:
        check(vllm_config, Model(rotated, table()), LENGTH + 1)
    check_sentence(str(caught.value), "has a rotary table of 300 positions, not of 301", REMEDY)
