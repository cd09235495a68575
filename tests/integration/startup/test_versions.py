"""Beside a vLLM that it was not written for, the plugin touches nothing and says why."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_models import write
from vllm_sepllm.integration.startup import versions


@pytest.mark.parametrize(
    "installed", ["0.32.0", "0.32.0+cpu", "0.32.1rc1", "0.33.0", "0.33.5.post1"]
)
def test_versions_that_work(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(versions, "version", lambda name: installed)
    assert versions.unsupported_vllm() is None


@pytest.mark.parametrize("installed", ["0.31.9", "0.34.0", "0.34.0rc1", "1.0"])
def test_other_versions(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(versions, "version", lambda name: installed)
    reason = versions.unsupported_vllm()
    assert reason is not None
    assert f"works with vllm >=0.32,<0.34, found {installed}; install one of these" in reason


ANOTHER = (
    "import sys, vllm_sepllm\n"
    "from vllm_sepllm.integration.startup import versions\n"
    "versions.version = lambda name: '0.40.0'\n"
)
REASON = "sepllm is not available: this version of vllm_sepllm works with"


def beside_another_vllm(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process whose vLLM says that it is 0.40."""
    command = [sys.executable, "-c", ANOTHER + code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_plugin_touches_nothing_of_another_vllm() -> None:
    """What we lean on may be gone there, and stock vLLM has to start all the same."""
    done = beside_another_vllm(
        "sys.modules['vllm.v1.attention.backends.registry'] = None\n"
        "vllm_sepllm.register_backend_name()\n"
        "vllm_sepllm.register()\n"
        "loaded = {m for m in sys.modules if m.startswith('vllm_sepllm.integration.')}\n"
        "print(*sorted(m.removeprefix('vllm_sepllm.integration.') for m in loaded))"
    )
    assert done.returncode == 0, done.stderr
    assert REASON in done.stderr
    startup = ["startup", "startup.unsupported", "startup.versions"]
    assert done.stdout.split() == ["log", "patch", *startup, "wire", "wire.backend_name"]


def test_whoever_selects_it_beside_another_vllm_reads_our_sentence(tmp_path: Path) -> None:
    folder = str(write("llama", tmp_path))
    done = beside_another_vllm(
        "from vllm.engine.arg_utils import EngineArgs\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "vllm_sepllm.register_backend_name()\n"
        "assert AttentionBackendEnum['FLASH_ATTN'].name == 'FLASH_ATTN'\n"
        f"model = {{'model': {folder!r}, 'skip_tokenizer_init': True}}\n"
        "parser = EngineArgs.add_cli_args(FlexibleArgumentParser())\n"
        "line = ['--model', model['model'], '--skip-tokenizer-init']\n"
        "line += ['--attention-backend', 'sepllm']\n"
        "for make in (\n"
        "    lambda: EngineArgs(**model, attention_config={'backend': 'sepllm'}),\n"
        "    lambda: EngineArgs(**model, attention_backend='sepllm'),\n"
        "    lambda: EngineArgs.from_cli_args(parser.parse_args(line)),\n"
        "):\n"
        "    try:\n"
        "        make().create_engine_config()\n"
        "    except ValueError as error:\n"
        "        print('RAISED', repr(str(error)))"
    )
    raised = [line for line in done.stdout.splitlines() if line.startswith("RAISED")]
    assert len(raised) == 3, done.stderr
    for sentence in raised:
        assert REASON in sentence
        assert "Unknown attention backend" not in sentence
