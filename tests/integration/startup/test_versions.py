"""Beside a vLLM that it was not written for, the plugin touches nothing and says why."""

import subprocess
import sys

import pytest

from vllm_sepllm.integration.startup import versions


@pytest.mark.parametrize("installed", ["0.32.0", "0.32.0+cpu", "0.32.1rc1", "0.32.5.post1"])
def test_versions_that_work(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(versions, "version", lambda name: installed)
    assert versions.unsupported_vllm() is None


@pytest.mark.parametrize("installed", ["0.31.9", "0.33.0", "0.33.0rc1", "1.0"])
def test_other_versions(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(versions, "version", lambda name: installed)
    reason = versions.unsupported_vllm()
    assert reason is not None
    assert f"works with vllm >=0.32,<0.33, found {installed}; install one of these" in reason


def test_plugin_imports_nothing_of_another_vllm() -> None:
    """What we lean on may be gone there, and stock vLLM has to start all the same."""
    code = (
        "import sys, vllm_sepllm\n"
        "from vllm_sepllm.integration.startup import versions\n"
        "versions.version = lambda name: '0.40.0'\n"
        "vllm_sepllm.register_backend_name()\n"
        "vllm_sepllm.register()\n"
        "assert not [m for m in sys.modules if m == 'vllm' or m.startswith('vllm.')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sepllm is not available: this version of vllm_sepllm works with" in done.stderr
