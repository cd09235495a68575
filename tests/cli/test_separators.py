"""``separators``: the sets, and what they find in a text, against counts made by hand."""

import json
from pathlib import Path

import pytest

from tests.support.command_line import Run
from vllm_sepllm.cli.separators import measure, token_rows
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.separators.vocabulary import Vocabulary

VOCABULARY = Vocabulary({0: "a", 1: ".", 2: ".\n", 3: " e.g.", 4: ","}, {5: "[INST]"}, 6)
IDS = [5, 0, 1, 0, 2, 3, 0, 4]


def test_density_and_recall() -> None:
    own = TokenSeparators((1, 4))
    result = measure("paper", own, IDS, VOCABULARY)
    # 8 tokens, of which ". .\n e.g. ," end in a separator
    assert (result.num_found, result.density, result.recall) == (2, 0.25, 0.5)
    assert measure("paper", own, [0, 5], VOCABULARY).recall is None


def test_rows_are_sorted_by_count_then_id() -> None:
    # 2 behind an a, which is none of the closers
    sets = {"paper": TokenSeparators((1, 4)), "unwrapped": TokenSeparators((1, 4), (2, 5), (1,))}
    rows = token_rows(IDS, sets, VOCABULARY)
    assert [(row.id, row.count) for row in rows] == [(0, 3), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]
    assert [row.rules for row in rows] == [
        {},
        {"paper": 1, "unwrapped": 1},
        {"unwrapped": 0},
        {},
        {"paper": 1, "unwrapped": 1},
        {"unwrapped": 0},
    ]
    assert rows[-1].surface == "[INST]"


def test_json_of_a_tiny_tokenizer(run: Run, tiny_model: Path, text_file: Path) -> None:
    answer = json.loads(run("separators", tiny_model, text_file, "--json"))
    paper, extended, unwrapped, sentences = answer["rules"]
    assert (paper["rule"], extended["rule"]) == ("paper", "extended")
    assert (unwrapped["rule"], sentences["rule"]) == ("unwrapped", "sentences")
    assert set(paper["ids"]) < set(extended["ids"])
    counts = {row["surface"]: row["count"] for row in answer["separators"]}
    assert (counts["?"], counts[";"], counts["<s>"]) == (40, 40, 1)
    assert paper["recall"] <= extended["recall"] <= 1
    assert sentences["num_found"] < unwrapped["num_found"] <= extended["num_found"]


def test_markup_in_tokens_is_shown_and_rows_are_limited(
    run: Run, tiny_model: Path, text_file: Path
) -> None:
    text = run("separators", tiny_model, text_file, "--limit", 2)
    assert "more; --limit 0 shows all" in text
    assert "recall: of the text's tokens that end in one of" in text
    assert "'<s>'" in run("separators", tiny_model, text_file, "--limit", 0)


def test_smollm2_on_the_bundled_document(run: Run, smollm2_path: Path) -> None:
    answer = json.loads(run("separators", smollm2_path, "--json"))
    assert (answer["text"], answer["num_tokens"]) == ("revere.txt", 6183)
    paper, extended, *others = answer["rules"]
    assert [result["rule"] for result in others] == ["unwrapped", "sentences"]
    assert (len(paper["ids"]), len(extended["ids"])) == (19, 460)
    assert (paper["num_found"], extended["num_found"]) == (949, 973)
    assert answer["separators"][0]["surface"] == "\n"


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\xff\xfe", "is not UTF-8 text")]
)
def test_unreadable_text(
    run: Run, tiny_model: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    assert message in run("separators", tiny_model, path, code=2)
