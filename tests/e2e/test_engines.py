"""Real engines: every way to select sepllm gives the same one, and no selection gives vLLM's."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine_process import NUM_NEW_TOKENS, Report, run
from tests.support.oracle import Rule, log_probabilities
from tests.support.tiny_models import SEPARATORS, random_prompts, write_weights

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

RULE = Rule(initial_tokens=3, window=16, separator_ids=frozenset(SEPARATORS))
POLICY = {"initial_tokens": 3, "window": 16, "separators": SEPARATORS}
SELECTED: dict[str, dict[str, Any]] = {
    "attention_backend": {"attention_backend": "sepllm"},
    "attention_config": {"attention_config": {"backend": "sepllm"}},
}
# they differ between two processes of stock vLLM
PROCESS_FIELDS = {"instance_id"}


def prompts() -> list[list[int]]:
    """Several times the window."""
    return random_prompts(150, 99)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reports(model: Path) -> dict[str, Future[Report]]:
    """All engines of this file, two at a time."""
    common = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 1 << 24,
        "enforce_eager": True,
    }
    jobs: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "no plugin": ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": ""}, {}),
        "not selected": ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, {}),
    }
    for processes in ("1", "0"):
        for name, arguments in SELECTED.items():
            environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": processes}
            policy = {"additional_config": {"sepllm": POLICY}}
            jobs[f"{name} {processes}"] = (environment, arguments | policy)
    with ThreadPoolExecutor(2) as pool:
        return {
            name: pool.submit(run, environment, llm=common | arguments, prompts=prompts())
            for name, (environment, arguments) in jobs.items()
        }


def greedy(model: Path, prompt: list[int], tokens: list[int], rule: Rule | None) -> list[int]:
    """What the oracle would have said at each new position."""
    every = log_probabilities(model, prompt + tokens, rule).argmax(-1).tolist()
    return every[len(prompt) - 1 : -1]


@pytest.mark.parametrize("processes", ["0", "1"])
@pytest.mark.parametrize("how", SELECTED)
def test_selected_engine_is_ours_and_exact(
    reports: dict[str, Future[Report]], model: Path, how: str, processes: str
) -> None:
    """Scheduler, worker and layers are ours in whatever process they live, and far past the window
    the tokens are those of the mask, which full attention would not give."""
    report = reports[f"{how} {processes}"].result()
    assert report.scheduler == "SepLLMScheduler"
    assert report.workers == ["SepLLMCPUWorker"]
    assert len(report.layers) == 2
    for impl, backend, spec in report.layers.values():
        assert (impl, backend) == ("SepLLMCPUImpl", "SepLLMCPUAttentionBackend")
        assert spec.startswith("SepLLMSpec(block_size=32,")
    assert "sepllm keeps the first 3 tokens, the last 16" in report.log
    is_full_attention = []
    for prompt, tokens in zip(prompts(), report.tokens, strict=True):
        assert len(tokens) == NUM_NEW_TOKENS
        assert tokens == greedy(model, prompt, tokens, RULE)
        is_full_attention.append(tokens == greedy(model, prompt, tokens, None))
    assert not any(is_full_attention), "the prompts do not tell the two apart"


@pytest.mark.compatibility("Plugin installed, another backend selected", "stock vLLM")
def test_engine_without_selection_is_stock(reports: dict[str, Future[Report]], model: Path) -> None:
    """With the plugin loaded and nothing selected, every field of the configuration, scheduler,
    worker, layers, KV cache specs and tokens equal those of a process without the plugin."""
    stock, ours = reports["no plugin"].result(), reports["not selected"].result()
    assert (stock.knows_sepllm, ours.knows_sepllm) == (False, True)
    assert stock.config.keys() == ours.config.keys()
    changed = {name for name in stock.config if stock.config[name] != ours.config[name]}
    assert changed <= PROCESS_FIELDS
    assert stock.scheduler == ours.scheduler == "Scheduler"
    assert stock.workers == ours.workers == ["CPUWorker"]
    assert stock.layers == ours.layers
    assert stock.tokens == ours.tokens
    for prompt, tokens in zip(prompts(), stock.tokens, strict=True):
        assert tokens == greedy(model, prompt, tokens, None)
