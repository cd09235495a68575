"""Texts of all separators, of none, and in scripts whose stops are not in every list."""

from pathlib import Path

import pytest

from tests.support.engine import engine, sepllm
from tests.support.measured import Number
from tests.support.oracle import TOLERANCE, differences, rule_of

pytestmark = pytest.mark.slow

REPEATED = ("\n", ".", " ")
TEXTS = {
    "base64": "TG9yZW0gaXBzdW0gZG9sb3Igc2l0IGFtZXQ" * 40,
    "Chinese": "分隔符携带了它所结束的片段的要点。保留初始标记、分隔符和最近的窗口。忘记其余部分。"
    * 12,
    "Thai": "ภาษาไทยเขียนติดกันโดยไม่มีช่องว่างระหว่างคำ และไม่มีจุดจบประโยค " * 12,
    "Arabic": "تحمل الفواصل جوهر المقطع الذي تغلقه، فاحتفظ بها؛ وانس الباقي. " * 20,
    "emoji": "🙂🚀🎉👩‍👩‍👧‍👦🇺🇳" * 40,
}


@pytest.mark.compatibility("Texts of separators alone, of none, of any script", "exact")
def test_unusual_texts_equal_the_dense_mask(four_layers_path: Path, number: Number) -> None:
    """Proves it for 3,000 newlines, full stops and blanks, base64, Chinese, Thai, Arabic, emoji."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(four_layers_path)
    # together they would be tokens of many
    prompts = [tokenizer(character)["input_ids"] * 3000 for character in REPEATED]
    prompts += [tokenizer(text)["input_ids"] for text in TEXTS.values()]
    assert all(len(prompt) > 800 for prompt in prompts)
    with engine(
        four_layers_path,
        **sepllm(window=60, separators="extended", max_separators=400),
        max_num_batched_tokens=512,
    ) as made:
        answers = made.generate(prompts, 8)
        rule = rule_of(made)
    num_other, largest = differences(four_layers_path, prompts, answers, rule)
    number("largest difference of a log-probability", largest)
    assert num_other == 0
    assert largest < TOLERANCE
