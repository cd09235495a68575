"""A checkpoint that was trained with SepLLM brings its policy, and is served with it or not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.trained_checkpoint import SEPARATORS, write_trained
from tests.support.trained_fields import BY_LAYER

pytest.importorskip("vllm")

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry

from vllm_sepllm.integration.startup import selection
from vllm_sepllm.integration.wire import trained_config
from vllm_sepllm.integration.wire.trained_config import ARCHITECTURE
from vllm_sepllm.integration.worker.trained_model import SepLLMGPTNeoXForCausalLM

Configure = Callable[..., VllmConfig]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    # vLLM inspects a model class that it has not imported in a process of its own, for 10 seconds
    monkeypatch.setattr(trained_config, "_MODEL", SepLLMGPTNeoXForCausalLM)

    def make(checkpoint: dict[str, Any], **arguments: Any) -> VllmConfig:
        model, _ = write_trained(tmp_path, **checkpoint)
        args = EngineArgs(
            str(model), skip_tokenizer_init=True, dtype="float32", max_model_len=512, **arguments
        )
        ModelRegistry.register_model(ARCHITECTURE, SepLLMGPTNeoXForCausalLM)
        return args.create_engine_config()

    return make


def test_policy_comes_from_the_checkpoint(configure: Configure) -> None:
    windows = [2048, 64, 64, 2048]
    lists = {"prefill_loc_win_size_list": windows, "generate_win_loc_size_list": windows}
    config = configure(BY_LAYER | lists, attention_backend="sepllm")
    expected = {
        "initial_tokens": 3,
        "window": 64,
        "separators": SEPARATORS,
        "max_separators": 512,
        "full_layers": [0, 3],
        "checkpoint_interval": 544,
    }
    assert expected.items() <= config.additional_config["sepllm"].items()


def test_what_the_user_sets_wins_with_a_warning(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(
        selection.logger, "warning", lambda text, *values: lines.append(text % values)
    )
    user = {"sepllm": {"window": 60, "initial_tokens": 3, "checkpoint_interval": 64}}
    config = configure({}, attention_backend="sepllm", additional_config=user)
    found = config.additional_config["sepllm"]
    assert (found["window"], found["checkpoint_interval"]) == (60, 64)
    assert (found["initial_tokens"], found["separators"]) == (3, SEPARATORS)
    # nothing to say about a value that agrees, nor about what training does not know
    assert lines == ["sepllm: window is set to 60, but the checkpoint was trained with 64."]


@pytest.mark.parametrize("backend", [None, "CPU_ATTN"])
def test_full_attention_would_be_another_model(configure: Configure, backend: str | None) -> None:
    with pytest.raises(ValueError, match="trained with SepLLM, and full attention would make anot"):
        configure({}, attention_backend=backend)


def test_a_baseline_with_full_attention_is_served_without_us(configure: Configure) -> None:
    config = configure({"USE_ORIGINAL_FULL_ATTEN": True})
    assert config.scheduler_config.scheduler_cls is None
    assert config.model_config.max_model_len == 512


def test_a_protected_prefix_would_be_another_model(configure: Configure) -> None:
    user = {"sepllm": {"protect": 7}}
    with pytest.raises(ValueError, match=r"was trained with 3 initial tokens, .* remove protect"):
        configure({}, attention_backend="sepllm", additional_config=user)


@pytest.mark.parametrize("backend", [None, "sepllm"])
@pytest.mark.parametrize(
    ("checkpoint", "what"),
    [
        ({"USE_BiPE": True}, "bilevel position encoding"),
        ({"USE_SA_SOFTMAX": True, "USE_ORIGINAL_FULL_ATTEN": True}, "self-adjusting softmax"),
    ],
)
def test_other_attention_is_refused_either_way(
    configure: Configure, backend: str | None, checkpoint: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match=f"does not support checkpoints with {what}"):
        configure(checkpoint, attention_backend=backend)


def test_a_window_that_sepllm_does_not_take_is_an_error(configure: Configure) -> None:
    small = {"prefill_local_window_size": 8, "generate_local_window_size": 8}
    with pytest.raises(ValueError, match="window: Input should be greater than or equal to 16"):
        configure(small, attention_backend="sepllm")
