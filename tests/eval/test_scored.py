"""Scored tasks in lm_eval's own vllm model, against the oracle."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval", reason="an extra")
pytestmark = pytest.mark.slow


def test_scored_answers_equal_the_oracle(
    four_layers_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that lm_eval's vllm model runs with our backend, and which tokens are scored."""
    from tests.support.oracle import Rule, log_probabilities
    from vllm_sepllm.cli.tokens import load_tokenizer
    from vllm_sepllm.eval import tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    told = "Anna was here. " * 40 + "It was Anna's own"
    lines = [{"context": told, "question": "", "answer": "lamp"}] * 2
    path = tmp_path / "qa.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    tokenizer = load_tokenizer(str(four_layers_path))
    task = tasks.make_task(tasks.passages(path), 2, tokenizer)
    settings = {"window": 60, "separators": [30, 28]}
    given = {"dtype": "float32", "kv_cache_memory_bytes": 64 << 20, "max_model_len": task.length}
    nothing: tasks.Store = None  # type: ignore[assignment]
    with task.opened(str(four_layers_path), settings, **given) as model:
        found = task.run(model, "sepllm", nothing)

    ids, answer = tokenizer(told)["input_ids"], tokenizer(" lamp")["input_ids"]
    assert len(ids) > 150
    rows = log_probabilities(four_layers_path, [*ids, *answer], Rule(4, 60, frozenset({28, 30})))
    first = len(ids) - 1
    own = [float(rows[first + i, token]) for i, token in enumerate(answer)]
    assert found["nll"] == pytest.approx([-sum(own) / len(own)] * 2, abs=1e-3)
    is_greedy = all(int(rows[first + i].argmax()) == token for i, token in enumerate(answer))
    assert found["is_right"] == [is_greedy] * 2
