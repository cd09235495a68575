"""The side by side of the published lists: the formula by hand, and that differences are seen."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from examples.paper import published
from vllm_sepllm.cli.tokens import load_tokenizer
from vllm_sepllm.policy.visibility import Policy, visible_mask

TEXT = "It was here, then there. " * 30 + "\n"


def test_the_formula_by_hand() -> None:
    is_separator = np.array([0, 1, 1, 0, 0, 0], dtype=bool)
    rows = published.formula(Policy(1, 2), is_separator)
    assert [np.flatnonzero(row).tolist() for row in rows[3:]] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 4, 5],
    ]


def test_a_list_beside_what_the_rule_derives(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    ids = tokenizer(TEXT)["input_ids"]
    alone = published.compare("unheard-of", tokenizer, ids)
    assert (alone.num_different, alone.num_sets) == (0, 3 * len(ids))
    assert (alone.only_published, alone.only_derived) == ((), ())
    assert 0.1 < alone.share < 0.5

    comma, word = (tokenizer(text)["input_ids"][0] for text in (",", " here"))
    monkeypatch.setitem(published.PUBLISHED, "llama-3", (comma, word))
    line = published.compare("llama-3", tokenizer, ids)
    assert line.only_published == (tokenizer.decode([word]),)
    assert "." in line.only_derived
    assert line.num_different == 0
    assert f"| llama-3 | {len(ids)} | 2 |" in published.markdown([line])


def test_differences_are_counted(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    ids = tokenizer(TEXT * 3)["input_ids"]

    def wider(policy: Policy, is_separator: published.BoolArray) -> published.BoolArray:
        return visible_mask(Policy(policy.initial_tokens, policy.window + 1), is_separator)

    monkeypatch.setattr(published, "visible_mask", wider)
    assert published.compare("unheard-of", tokenizer, ids).num_different > 100
