"""What the demonstration asks about the bundled documents."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one document.

    Attributes:
        text: of the question.
        told: words of the document that answer it; every right answer has them.
    """

    text: str
    told: str

    def part_of(self, document: str, num_characters: int | None) -> str:
        """The document, or so much of its beginning or end, whichever answers."""
        beginning = document[:num_characters]
        if num_characters is None or self.told in beginning:
            return beginning
        return document[-num_characters:]

    def is_answered_by(self, answer: str) -> bool:
        """Whether an answer has the words, whatever its line breaks and capitals."""
        return " ".join(self.told.split()).lower() in " ".join(answer.split()).lower()


# two are told in the last window of their documents, the others long before
QUESTIONS = {
    "glow-worm": Question("What did the Greeks of old call the Glow-worm?", "lampouris"),
    "grasshopper": Question("What does the Empusa use her pointed cap for?", "protective crest"),
    "redwoods": Question("What is the full name of Katinka's father?", "Henry Boone Jallinger"),
    "revere": Question(
        "What had obscured the side-lamps of the hind van of the third train?", "horse-box"
    ),
    "sierras": Question("What is the name of the mining company?", "Eureka Mining Company"),
    "versailles": Question("On which date did the Versailles accident happen?", "8th of May, 1842"),
}


def chat(document: str, question: str) -> list["ChatCompletionMessageParam"]:
    """One user message in the format of the OpenAI API: the document, then the question."""
    return [{"role": "user", "content": f"{document}\n\n{question}"}]
