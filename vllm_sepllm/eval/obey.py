"""Instructions in a system prompt, and whether they are obeyed after a long conversation.

The conversation is passages of a text and short replies; then a question is asked that the
instruction is about. Nothing behind the system prompt tells what it asks for.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from vllm_sepllm.eval.prompts import chat_ids, filled
from vllm_sepllm.eval.questions import Generated, Question

MAX_ANSWER_TOKENS = 80
Instruction = Literal["word", "tool"]

# characters of a passage, which is a turn
_PASSAGE = 1500
# one reply alone would be repeated to the question as well, by small models
_REPLIES = (
    "Thank you, please go on.",
    "I see. What comes next?",
    "Noted; I am ready for more.",
    "That was interesting to read.",
    "All right, I have read it.",
)
# one more character of the text may begin a passage
_SLACK = 64
_WORDS = ("zephyr", "marble", "lantern", "walnut", "copper", "meadow", "anchor", "velvet", "ginger")
_QUESTIONS = (
    "What is the capital of France?",
    "How many days does a week have?",
    "Which planet is the largest of the solar system?",
    "What do bees make?",
    "At what temperature does water boil?",
    "Which animal is called man's best friend?",
    "What colour is the sky on a clear day?",
    "In which country are the pyramids of Giza?",
)
_CITIES = ("Lisbon", "Nairobi", "Osaka", "Quito", "Tallinn", "Perth", "Oslo", "Lima", "Cairo")
# what a tool does, and a question for it
_TOOLS = (
    ("Current weather of a city.", "What is the weather in {city} now?"),
    ("Local time of a city.", "What time is it in {city} now?"),
    ("Next train to a city.", "When does the next train to {city} leave?"),
    ("Hotels of a city that have a free room.", "Which hotels in {city} have a free room?"),
)


def obedience(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    name: str,
    instruction: Instruction,
    length: int,
    num_items: int,
    num_a_round: int | None,
) -> Generated:
    """Requests of one context length; the same for the same arguments.

    Args:
        tokenizer: the model's, which must have a chat template.
        texts: what the conversations are made of; another passage each time.
        name: of the task.
        instruction: "word": answers to questions end with a word; "tool": a tool with a name that
            cannot be guessed is called.
        length: context that system prompt, conversation and answer fill.
        num_items: how many.
        num_a_round: see Task.

    Raises:
        ValueError: if there is no chat template, or a text does not fill the context.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"task {name}: a system prompt needs a model with a chat template")
    items = []
    for number in range(num_items):
        chance = random.Random(f"{instruction} {length} {number}")
        text = texts[number % len(texts)]
        start = chance.randrange(len(text) // 10, max(len(text) // 10 + 1, len(text) // 2))
        system, question, wanted, grade = _ASKED[instruction](chance)

        def prompt(passages: str, system: str = system, question: str = question) -> list[int]:
            return chat_ids(tokenizer, _conversation(system, passages, question))

        ids = filled(prompt, text[start:], length, MAX_ANSWER_TOKENS, _SLACK)
        answer = tuple(tokenizer(wanted, add_special_tokens=False)["input_ids"])
        items.append(Question(str(number), ids, answer, grade))
    sampling = {"max_tokens": MAX_ANSWER_TOKENS}
    return Generated(name, length, tuple(items), None, num_a_round, sampling)


def _conversation(system: str, text: str, question: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}]
    for number, start in enumerate(range(0, len(text), _PASSAGE), 1):
        passage = text[start : start + _PASSAGE]
        messages.append({"role": "user", "content": f"Passage {number}:\n{passage}"})
        messages.append({"role": "assistant", "content": _REPLIES[number % len(_REPLIES)]})
    return [*messages, {"role": "user", "content": question}]


_Asked = tuple[str, str, str, Callable[[str], dict[str, bool]]]


def _word(chance: random.Random) -> _Asked:
    """System prompt, question, about what is answered, and whether an answer ends with the word."""
    word, question = chance.choice(_WORDS), chance.choice(_QUESTIONS)
    system = (
        "You are a helpful assistant. The user shows you passages of a book and asks questions. "
        f'Your password is "{word}". Every answer to a question must end with your password, '
        f'whatever the question is. For example: "Rome is in Italy, {word}."'
    )

    def grade(text: str) -> dict[str, bool]:
        return {"obeyed": re.findall(r"\w+", text.lower())[-1:] == [word]}

    asked = f"{question} Answer in one sentence that ends with your password."
    return system, asked, f"It is what everybody knows, {word}.", grade


def _tool(chance: random.Random) -> _Asked:
    """The same for a tool that must be called by its name."""
    city, used = chance.choice(_CITIES), chance.randrange(len(_TOOLS))
    names = [f"fn_{chance.choice(_WORDS)}_{chance.randrange(100, 1000)}" for _ in _TOOLS]
    arguments = {"type": "object", "properties": {"city": {"type": "string"}}}
    schemas = [
        json.dumps({"name": name, "description": what, "parameters": arguments})
        for name, (what, _) in zip(names, _TOOLS, strict=True)
    ]
    system = (
        "You are a helpful assistant with tools. The user shows you passages of a book and asks "
        "questions. To call a tool, answer with one line of JSON alone, such as "
        '{"name": TOOL, "arguments": {"city": CITY}}. The tools are:\n' + "\n".join(schemas)
    )

    def grade(text: str) -> dict[str, bool]:
        return {"obeyed": names[used] in text}

    call = json.dumps({"name": names[used], "arguments": {"city": city}})
    return system, f"{_TOOLS[used][1].format(city=city)} Call the right tool.", call, grade


_ASKED: dict[Instruction, Callable[[random.Random], _Asked]] = {"word": _word, "tool": _tool}
