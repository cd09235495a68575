"""``separators``: the sets, and what they find in a text, against counts made by hand."""

import json
from pathlib import Path

import pytest

from tests.support.command_line import Run
from vllm_sepllm.cli.separators import measure, token_rows
from vllm_sepllm.policy.separators.vocabulary import Vocabulary

VOCABULARY = Vocabulary({0: "a", 1: ".", 2: ".\n", 3: " e.g.", 4: ","}, {5: "[INST]"}, 6)
IDS = [5, 0, 1, 0, 2, 3, 0, 4]


def test_density_and_recall() -> None:
    result = measure("paper", (1, 4), IDS, VOCABULARY)
    # 8 tokens, of which ". .\n e.g. ," end in a separator
    assert (result.num_found, result.density, result.recall) == (2, 0.25, 0.5)
    assert measure("paper", (1, 4), [0, 5], VOCABULARY).recall is None


def test_rows_are_sorted_by_count_then_id() -> None:
    rows = token_rows(IDS, (1, 4), (1, 2, 4, 5), VOCABULARY)
    assert [(row.id, row.count) for row in rows] == [(0, 3), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]
    assert [row.id for row in rows if row.is_extended and not row.is_paper] == [2, 5]
    assert rows[-1].surface == "[INST]"


def test_json_of_a_tiny_tokenizer(run: Run, tiny_model: Path, text_file: Path) -> None:
    answer = json.loads(run("separators", tiny_model, text_file, "--json"))
    paper, extended = answer["rules"]
    assert (paper["rule"], extended["rule"]) == ("paper", "extended")
    assert set(paper["ids"]) < set(extended["ids"])
    counts = {row["surface"]: row["count"] for row in answer["separators"]}
    assert (counts["?"], counts[";"], counts["<s>"]) == (40, 40, 1)
    assert paper["recall"] <= extended["recall"] <= 1


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
    paper, extended = answer["rules"]
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
