"""Real engines: every way to select sepllm gives the same one, and no selection gives vLLM's."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import IN_PROCESS, started
from tests.support.engine_process import MAY_ASK, report_of, run
from tests.support.oracle import greedy
from tests.support.tiny_engine import NUM_TOKENS, POLICY, STOCK, check, prompts

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

SELECTED: dict[str, dict[str, Any]] = {
    "attention_backend": {"attention_backend": "sepllm"},
    "attention_config": {"attention_config": {"backend": "sepllm"}},
}
COMMON = STOCK | {"skip_tokenizer_init": True, "enforce_eager": True}
# they differ between two processes of stock vLLM
PROCESS_FIELDS = {"instance_id"}


@pytest.mark.parametrize(
    ("how", "processes"),
    [("attention_backend", "0"), ("attention_backend", "1"), ("attention_config", "0")],
)
def test_selected_engine_is_ours_and_exact(
    tiny_llama_path: Path, how: str, processes: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Scheduler, worker and layers are ours in whatever process they live, and far past the window
    the tokens are those of the mask, which full attention would not give."""
    environment = IN_PROCESS | MAY_ASK | {"VLLM_ENABLE_V1_MULTIPROCESSING": processes}
    arguments = SELECTED[how] | {"additional_config": {"sepllm": POLICY}}
    arguments |= COMMON | {"model": str(tiny_llama_path)}
    with started(environment, **arguments) as llm:
        report = report_of(llm, prompts(), NUM_TOKENS)
    assert report.scheduler == "SepLLMScheduler"
    assert report.workers == ["SepLLMCPUWorker"]
    assert len(report.layers) == 2
    for impl, backend, spec in report.layers.values():
        assert (impl, backend) == ("SepLLMCPUImpl", "SepLLMCPUAttentionBackend")
        assert spec.startswith("SepLLMSpec(block_size=32,")
    assert "sepllm keeps the first 3 tokens, the last 16" in caplog.text
    for prompt, tokens in zip(prompts(), report.tokens, strict=True):
        check(tiny_llama_path, prompt, tokens)


@pytest.mark.compatibility("Plugin installed, another backend selected", "stock vLLM")
def test_engine_without_selection_is_stock(tiny_llama_path: Path) -> None:
    """With the plugin loaded and nothing selected, every field of the configuration, scheduler,
    worker, layers, KV cache specs and tokens equal those of a process without the plugin."""
    arguments = COMMON | {"model": str(tiny_llama_path)}
    job: dict[str, Any] = {"prompts": prompts(), "num_new_tokens": NUM_TOKENS}
    stock, ours = (
        run(IN_PROCESS | plugins, llm=arguments, **job) for plugins in ({"VLLM_PLUGINS": ""}, {})
    )
    assert (stock.knows_sepllm, ours.knows_sepllm) == (False, True)
    assert stock.config.keys() == ours.config.keys()
    changed = {name for name in stock.config if stock.config[name] != ours.config[name]}
    assert changed <= PROCESS_FIELDS
    assert stock.scheduler == ours.scheduler == "Scheduler"
    assert stock.workers == ours.workers == ["CPUWorker"]
    assert stock.layers == ours.layers
    assert stock.tokens == ours.tokens
    for prompt, tokens in zip(prompts(), stock.tokens, strict=True):
        assert tokens == greedy(tiny_llama_path, prompt, tokens, None)
