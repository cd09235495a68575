"""Model folders and text of other folders of tests."""

from tests.cli.conftest import tiny_model
from tests.e2e.conftest import excerpt, four_layers_path, text_ids

__all__ = ["excerpt", "four_layers_path", "text_ids", "tiny_model"]
