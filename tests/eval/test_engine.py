"""What the evaluation reads out of vLLM is what the model says."""

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


def test_scores_equal_the_oracle(
    four_layers_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves log-probabilities, best tokens and whole distributions, over several chunks."""
    from tests.support.oracle import Rule, log_probabilities
    from vllm_sepllm.eval.engine import running

    ids, positions = excerpt(3000, 400), [0, 127, 128, 300, 398]
    settings = {"window": 60, "separators": [30, 28]}
    arguments = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 64 << 20}
    with running(
        str(four_layers_path), settings, max_num_batched_tokens=128, **arguments
    ) as engine:
        scores = engine.score(ids, positions)
        answers = dict(engine.generate([ids, ids[:200]], max_tokens=4))
    expected = log_probabilities(four_layers_path, ids, Rule(4, 60, frozenset({28, 30})))
    own = expected[torch.arange(399), torch.tensor(ids[1:])]
    assert torch.allclose(torch.tensor(scores.logprobs), own, atol=1e-3)
    assert scores.top_ids == expected[:-1].argmax(dim=-1).tolist()
    assert torch.allclose(scores.distributions, expected[positions], atol=1e-3)
    assert sorted(answers) == [0, 1]
    # the first token of an answer is the best one behind its prompt
    assert answers[0].outputs[0].token_ids[0] == int(expected[-1].argmax())
    assert answers[1].outputs[0].token_ids[0] == int(expected[199].argmax())
