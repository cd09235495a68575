"""What the demonstration asks about the bundled documents."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

SUMMARY = "Say in two or three sentences what this text is about."


def chat(document: str, question: str) -> list["ChatCompletionMessageParam"]:
    """One user message in the format of the OpenAI API: the document, then the question."""
    return [{"role": "user", "content": f"{document}\n\n{question}"}]
