"""What only GPUs run and sepllm refuses: vLLM has no runner for it here, so checks are asked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from tests.support.compatibility import refused
from tests.support.refusals import check_sentence
from tests.support.tiny_models import ARGUMENTS, write
from vllm_sepllm.integration.startup import connectors
from vllm_sepllm.integration.startup.refusals import (
    _speculative_reasons,
    check_drafts,
    check_vllm_config,
)


def make_config(**speculative: Any) -> Any:
    drafts = SimpleNamespace(**({"method": "ngram", "num_speculative_tokens": 2} | speculative))
    return SimpleNamespace(
        speculative_config=drafts,
        num_speculative_tokens=drafts.num_speculative_tokens,
        use_v2_model_runner=True,
    )


def test_drafters_that_share_states_with_the_model() -> None:
    reasons = _speculative_reasons(make_config(method="eagle"))
    (found,) = [text for is_unsupported, text in reasons if is_unsupported]
    check_sentence(
        f"sepllm does not support {found}", "speculative decoding with 'eagle'", "use one of"
    )


def test_connectors_that_move_drafts_or_stage_blocks_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_config = EngineArgs(
        model=str(write("llama", tmp_path)),
        kv_transfer_config={"kv_connector": "NixlConnector", "kv_role": "kv_both"},  # type: ignore[arg-type]
        **ARGUMENTS,
    ).create_engine_config()
    assert not any(is_unsupported for is_unsupported, _ in connectors.reasons(vllm_config))
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _self: False)
    vllm_config.speculative_config = make_config().speculative_config
    found = [text for is_unsupported, text in connectors.reasons(vllm_config) if is_unsupported]
    for text, what, remedy in zip(
        found,
        ("KV transfers through host memory", "speculative decoding with a KV connector"),
        ("remove kv_buffer_device", "remove --speculative-config"),
        strict=True,
    ):
        check_sentence(f"sepllm does not support {text}", what, remedy)


def test_more_drafts_than_the_resolved_window_takes() -> None:
    check_drafts(make_config(num_speculative_tokens=7), 16)
    with pytest.raises(ValueError, match="9 draft tokens with a window of 16") as caught:
        check_drafts(make_config(num_speculative_tokens=9), 16)
    check_sentence(str(caught.value), "sepllm does not support 9 draft tokens", "7 or less")


@pytest.mark.parametrize("capability", [80, 89])
def test_fp8_caches_below_compute_capability_8_9(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: int
) -> None:
    vllm_config = EngineArgs(
        model=str(write("llama", tmp_path)), **ARGUMENTS
    ).create_engine_config()
    vllm_config.cache_config.cache_dtype = "fp8"
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cpu", lambda _self: False)
    monkeypatch.setattr(platform, "is_cuda", lambda _self: True)
    has = classmethod(lambda _cls, needed: capability >= needed)
    monkeypatch.setattr(platform, "has_device_capability", has)
    if capability >= 89:
        check_vllm_config(vllm_config)
        return
    with pytest.raises(ValueError, match="sepllm does not support") as caught:
        check_vllm_config(vllm_config)
    check_sentence(str(caught.value), "below compute capability 8.9", "remove --kv-cache-dtype")


@refused("`--enable-return-routed-experts`", "returned routed experts", "remove --enable-return")
def test_returned_routed_experts(tmp_path: Path) -> None:
    """Mixtures of experts under Model Runner V2 alone, so the check is asked directly."""
    vllm_config = EngineArgs(
        model=str(write("llama", tmp_path)), **ARGUMENTS
    ).create_engine_config()
    vllm_config.aux_output_config.enable_return_routed_experts = True
    with pytest.raises(ValueError, match="sepllm does not support") as caught:
        check_vllm_config(vllm_config)
    check_sentence(str(caught.value), "returned routed experts", "remove --enable-return")
