"""``caplog`` sees what vLLM and this package log (a pytest plugin, see conftest.py)."""

import logging

import pytest


@pytest.fixture
def caplog(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """pytest's own, which listens at the root: vLLM keeps its records from there."""
    pytest.importorskip("vllm")  # its import sets up the logger, so it comes first
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog
