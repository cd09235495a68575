"""Scored answers, against the oracle."""

from pathlib import Path
from typing import Any, cast

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


def test_scored_answers_equal_the_oracle(four_layers_path: Path) -> None:
    """Proves which tokens are scored, and that requests of one batch are told apart."""
    from tests.support.oracle import Rule, log_probabilities
    from vllm_sepllm.cli.tokens import load_tokenizer
    from vllm_sepllm.eval.engine import running
    from vllm_sepllm.eval.questions import Question, Scored, encode

    tokenizer = load_tokenizer(str(four_layers_path))
    told = "Anna was here. " * 40 + "It was Anna's own"
    pairs = [(told, " lamp"), (told, " yellow umbrella"), (told[400:], " lamp")]
    items = tuple(
        Question(str(i), *encode(tokenizer, prompt, answer))
        for i, (prompt, answer) in enumerate(pairs)
    )
    assert len(items[0].prompt) > 150
    settings = {"window": 60, "separators": [30, 28]}
    given = {"dtype": "float32", "kv_cache_memory_bytes": 64 << 20, "max_model_len": 512}
    task = Scored("qa", 512, items)
    with running(str(four_layers_path), settings, **given) as engine:
        found = dict(task.run(engine, items, "qa/sepllm", cast(Any, None)))
    for item in items:
        ids = [*item.prompt, *item.answer]
        rows = log_probabilities(four_layers_path, ids, Rule(4, 60, frozenset({28, 30})))
        first = len(item.prompt) - 1
        own = [float(rows[first + i, token]) for i, token in enumerate(item.answer)]
        assert found[item.name]["nll"] == pytest.approx(-sum(own) / len(own), abs=1e-3)
        is_greedy = all(int(rows[first + i].argmax()) == t for i, t in enumerate(item.answer))
        assert found[item.name]["right"] == {"greedy": is_greedy}
