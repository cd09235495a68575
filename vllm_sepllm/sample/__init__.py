"""Six public-domain documents in English, for demonstrations, measurements and tests."""

from pathlib import Path

FOLDER = Path(__file__).parent / "documents"


def documents() -> dict[str, str]:
    """Title -> text of every document, about 6,700 tokens each."""
    return {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.txt"))}
