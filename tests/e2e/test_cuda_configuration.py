"""vLLM's configuration with sepllm on an H100, made on a machine that has none."""

import json
from pathlib import Path

import pytest

from tests.support.cuda_configuration import configured
from tests.support.tiny_models import write

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

GPU_WORKER = "vllm_sepllm.integration.worker.gpu.worker.SepLLMGPUWorker"
SCHEDULERS = "vllm_sepllm.integration.scheduler.scheduler"
POLICY = {"separators": [1], "window": 60}


def test_configuration(tmp_path: Path) -> None:
    """Proves that start-up chooses the GPU worker and wraps the backend of the user's choice, that
    it leaves stock vLLM alone, and what it refuses there and not on CPUs.
    """
    common = {
        "model": str(write("llama", tmp_path)),
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
    }
    sepllm = {"attention_backend": "sepllm", "additional_config": {"sepllm": POLICY}}
    infer = {"sepllm": POLICY | {"decode_backend": "FLASHINFER"}}
    drafts = {"method": "ngram", "num_speculative_tokens": 3}
    stock, plain, flashinfer, drafting, fp8, too_many = configured(
        tmp_path / "cache",
        common,
        common | sepllm,
        common | sepllm | {"additional_config": infer},
        common | sepllm | {"speculative_config": drafts},
        common | sepllm | {"kv_cache_dtype": "fp8"},
        common | sepllm | {"speculative_config": drafts | {"num_speculative_tokens": 40}},
    )
    assert "sepllm" not in json.dumps(stock)
    assert plain["worker"] == fp8["worker"] == GPU_WORKER
    assert plain["scheduler"] == f"{SCHEDULERS}.SepLLMAsyncScheduler"
    assert "refusal" not in drafting, drafting
    assert drafting["v2"]
    assert drafting["scheduler"] == f"{SCHEDULERS}.SepLLMScheduler"
    assert plain["backend"] == "None"
    assert "FLASHINFER" in flashinfer["backend"]
    assert plain["graphs"] == stock["graphs"]
    assert "40 draft tokens with a window of 60" in too_many["refusal"]
