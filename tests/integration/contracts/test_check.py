"""The installed vLLM is what our code was written against; others are read from a folder."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm_sepllm.integration.contracts import check


def test_the_installed_vllm_keeps_what_an_engine_needs() -> None:
    tree = check.installed()
    assert len(check.contracts(tree)) > 300, "the walk has lost our code"
    assert check.broken(tree) == []


def test_it_keeps_what_benchmarks_need() -> None:
    tree = check.installed()
    assert len(check.derived(tree, rigs=True)) > 10, "the walk has lost the rigs"
    assert check.broken_rigs(tree) == []


def test_a_folder_without_vllm_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold the package vllm"):
        check.unpacked(tmp_path)


def test_the_command_ends_with_1_if_anything_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["check"])
    with pytest.raises(SystemExit, match="0"):
        check.main()
    assert capsys.readouterr().out.startswith("all ")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.setattr(sys, "argv", ["check", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        check.main()
    assert "vllm.v1.core.sched.scheduler:Scheduler.running: gone" in capsys.readouterr().out


def test_the_command_prints_what_changed_since(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["check", "--since", str(check.installed().root)])
    check.main()
    *title, summary = capsys.readouterr().out.split("\n\n")
    assert title == ["Other members of these classes that changed (+ new, - gone):", ""]
    assert summary.startswith("0 of ")
