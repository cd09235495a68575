"""The bundled documents are long enough to matter and short enough for the model."""

from pathlib import Path

import pytest

from vllm_sepllm.demo.corpus import SUMMARY, chat
from vllm_sepllm.sample import FOLDER, documents


def test_every_document_is_named_in_the_source_list() -> None:
    listed = (FOLDER / "README.md").read_text()
    assert len(documents()) == 6
    assert all(f"| {title}.txt |" in listed for title in documents())


def test_question_follows_the_document() -> None:
    assert chat("text", "why?") == [{"role": "user", "content": "text\n\nwhy?"}]


@pytest.mark.slow
def test_a_document_and_its_answer_fit_the_model(smollm2_path: Path) -> None:
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(smollm2_path).apply_chat_template
    lengths = {
        title: len(template(chat(text, SUMMARY), return_dict=True)["input_ids"])
        for title, text in documents().items()
    }
    assert all(6000 < length < 8192 - 256 for length in lengths.values()), lengths
