"""The documents that the demonstration asks about, and its questions."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

FOLDER = Path(__file__).parent / "documents"
SUMMARY = "Say in two or three sentences what this text is about."


def documents() -> dict[str, str]:
    """Title -> text of every bundled document, about 6,700 tokens each."""
    return {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.txt"))}


def chat(document: str, question: str) -> list["ChatCompletionMessageParam"]:
    """One user message in the format of the OpenAI API: the document, then the question."""
    return [{"role": "user", "content": f"{document}\n\n{question}"}]
