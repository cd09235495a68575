"""The model folder of the command line's tests."""

from tests.cli.conftest import tiny_model

__all__ = ["tiny_model"]
