"""Commands run in the tests' own process and leave it as it was."""

import os
from collections.abc import Iterator

import pytest

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _same_environment_afterwards() -> Iterator[None]:
    """Commands set variables for their own process, which here is that of other tests, too."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
