"""What a user reads when something is refused: one sentence, what and what to do instead."""


def check_sentence(text: str, what: str, remedy: str) -> None:
    assert what in text
    assert remedy in text
    assert "\n" not in text
    assert not text.endswith(".")
