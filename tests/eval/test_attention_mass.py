"""Attention mass per class, against weights that the model itself returns."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.support.tiny_models import eager_llama  # noqa: E402
from vllm_sepllm.eval.attention_mass import measure, queries  # noqa: E402
from vllm_sepllm.policy.visibility import Policy  # noqa: E402

POLICY = Policy(2, 10)


def test_mass_is_that_of_the_weights() -> None:
    model, random = eager_llama(3), np.random.default_rng(0)
    ids = random.integers(0, 50, 90).tolist()
    is_separator = np.array(ids) < 8
    found = {m.name: m for m in measure(model, ids, is_separator, POLICY)}
    assert sum(m.mass for m in found.values()) == pytest.approx(1, abs=1e-5)
    assert sum(m.share for m in found.values()) == pytest.approx(1)

    with torch.inference_mode():
        weights = model(torch.tensor([ids]), output_attentions=True).attentions
    mean = torch.stack(weights)[:, 0].mean(dim=(0, 1))
    expected = {"initial": 0.0, "kept separator": 0.0, "window": 0.0, "forgotten": 0.0}
    chosen = queries(POLICY, 90)
    for i in chosen:
        for j in range(i + 1):
            if j < 2:
                name = "initial"
            elif i - j < 10:
                name = "window"
            else:
                name = "kept separator" if is_separator[j] else "forgotten"
            expected[name] += float(mean[i, j]) / len(chosen)
    for name, mass in expected.items():
        assert found[name].mass == pytest.approx(mass, abs=1e-5)


def test_queries_are_those_that_forget() -> None:
    assert queries(POLICY, 15) == [12, 13, 14]
    assert queries(POLICY, 5) == [0, 1, 2, 3, 4]
    assert len(queries(POLICY, 1000)) == 64


def test_a_model_without_such_layers_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    model.get_decoder = lambda: model  # type: ignore[method-assign]
    model.forward = lambda *_a, **_k: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no layers with self_attn"):
        measure(model, [1, 2, 3], np.zeros(3, dtype=bool), POLICY)
