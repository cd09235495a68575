"""``doctor``: every finding has its line, and one that is wrong ends it with 1."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Run

pytest.importorskip("vllm")

from vllm.distributed import nixl_utils

from vllm_sepllm.cli import doctor
from vllm_sepllm.cli.tokens import load_tokenizer
from vllm_sepllm.integration.contracts import check
from vllm_sepllm.integration.contracts.contract import Contract
from vllm_sepllm.policy.separators.rules import token_separators

TRANSFER = '{"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}'
FAKE_NIXL = Path(__file__).parents[1] / "support" / "fake_nixl"


def findings(run: Run, *arguments: object, code: int = 0) -> dict[str, Any]:
    text = run("doctor", "--json", *arguments, code=code)
    answer = json.loads(text[text.index("{") :])
    assert answer["ok"] is (code == 0)
    return {check["name"]: check for check in answer["checks"]}


def test_a_whole_installation(run: Run) -> None:
    found = findings(run)
    assert found["vllm"]["detail"].startswith("0.3")
    assert found["entry point vllm.general_plugins"]["is_ok"]
    assert found["registered"]["is_ok"]
    assert found["contracts with vLLM"]["is_ok"]
    assert "Everything is in order." in run("doctor")


def test_a_model_that_passes(run: Run, tiny_model: Path) -> None:
    found = findings(run, tiny_model, "--config", '{"window": 60}')
    assert found[str(tiny_model)]["detail"].startswith("not refused; ")
    assert "window 60, max_separators 256, full_layers []" in found["settings"]["detail"]
    num_ids = len(token_separators("sentences", load_tokenizer(str(tiny_model))).token_ids)
    assert f"num_separator_ids {num_ids}, " in found["settings"]["detail"]
    given = findings(run, tiny_model, "--config", '{"separators": [5, 6]}')
    assert "num_separator_ids 2, " in given["settings"]["detail"]


def test_a_protected_prefix(run: Run, tiny_model: Path) -> None:
    """One token of the tokenizer, or a refusal that says so."""
    found = findings(run, tiny_model, "--config", '{"protect": "<s>", "max_protected": 900}')
    detail = "'<s>' is one token, 0: it ends a prefix of up to 900 tokens that every query reads"
    assert found["protect"] == {"name": "protect", "is_ok": True, "detail": detail}
    assert "protect" not in findings(run, tiny_model)
    found = findings(run, tiny_model, "--config", '{"protect": "<|end|>"}', code=1)
    assert "protect must be the text of one token" in found[str(tiny_model)]["detail"]


def test_a_refusal_of_ours_and_one_of_vllm(run: Run, tiny_model: Path) -> None:
    options = ("--engine-args", '{"enable_prompt_embeds": true}')
    found = findings(run, tiny_model, *options, code=1)
    refusal = found[str(tiny_model)]["detail"]
    assert refusal.startswith("refused by sepllm: sepllm does not support prompt embeddings")
    found = findings(run, tiny_model, "--engine-args", '{"dtype": "int3"}', code=1)
    assert found[str(tiny_model)]["detail"].startswith("refused by vLLM itself: ")
    assert "\n" not in found[str(tiny_model)]["detail"]


def test_a_model_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    """tests/cli/test_unreadable.py has the reasons."""
    missing = str(tmp_path / "model")
    found = findings(run, missing, code=1)[missing]["detail"]
    assert found.startswith("not read: there is no such folder; name the one that holds")
    found = findings(run, tmp_path, code=1)[str(tmp_path)]["detail"]
    assert found.startswith("not read: the folder has no config.json; ")
    found = findings(run, "nobody/nothing", code=1)["nobody/nothing"]["detail"]
    assert found.startswith("not read: there is no such folder, and no config.json of it in the")


@pytest.fixture
def no_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    """No NIXL, whatever this machine has; and vLLM, which looks for it once, is to look again."""
    for name in ("nixl", "nixl._api"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    monkeypatch.setitem(vars(nixl_utils), "NixlWrapper", None)
    del nixl_utils.NixlWrapper
    monkeypatch.setattr(doctor, "installed_version", {"vllm": "0.32.0"}.get)


@pytest.mark.usefixtures("no_nixl")
def test_no_nixl_is_no_fault_without_a_transfer(run: Run, tiny_model: Path) -> None:
    found = findings(run, tiny_model)["nixl"]
    assert found["is_ok"] is None
    assert found["detail"].startswith("not installed; NixlConnector ")
    assert found["detail"].endswith("pip install nixl")
    found = findings(run, tiny_model, "--engine-args", TRANSFER, code=1)
    assert found["nixl"]["is_ok"] is False
    assert found[str(tiny_model)]["is_ok"]


@pytest.mark.usefixtures("no_nixl")
def test_nixl(run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"vllm": "0.32.0", "nixl": "1.2.3"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    broken = findings(run)["nixl"]
    assert broken["detail"].startswith("1.2.3 cannot be imported: ")
    del nixl_utils.NixlWrapper
    monkeypatch.syspath_prepend(FAKE_NIXL)
    monkeypatch.setattr(os, "sched_setaffinity", os.sched_setaffinity)  # the fake replaces it
    for name in ("nixl", "nixl._api"):
        monkeypatch.delitem(sys.modules, name)
    assert findings(run)["nixl"]["detail"] == "1.2.3; NixlConnector can start"
    assert findings(run, tiny_model, "--engine-args", TRANSFER)["nixl"]["is_ok"]


def test_a_contract_that_moved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = (Contract("vllm.config:Gone", "read"), Contract("vllm.gone:Name", "called"))
    monkeypatch.setattr(check, "BY_HAND", {"startup": moved})
    found = findings(run, code=1)
    num = len(check.contracts(check.installed()))
    assert found["contracts with vLLM"]["detail"] == f"{num - 2} of {num} kept"
    text = run("doctor", code=1)
    assert "vllm.config:Gone: gone (read)" in text
    assert "vllm.gone:Name: gone (called)" in text


def test_a_benchmark_that_vllm_broke_is_no_finding(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "broken_rigs", lambda tree: ["vllm.gone:Name: gone (benchmarks)"])
    assert findings(run)["contracts with vLLM"]["is_ok"]


def test_no_vllm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    found = findings(run, "model", code=1)
    assert "pip install" in found["vllm"]["detail"]
    assert "platform" not in found


def test_a_plugin_that_vllm_cannot_find(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda group: ())
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    found = findings(run, code=1)
    assert "install vllm_sepllm with pip" in found["entry point vllm.platform_plugins"]["detail"]
    assert "'other' leaves sepllm out" in found["VLLM_PLUGINS"]["detail"]


@pytest.mark.parametrize("model", [(), ("model",)])
@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "a JSON object"), ('{"windows": 1}', "unknown key 'windows'")],
)
def test_settings_that_are_wrong(run: Run, model: tuple[str, ...], text: str, message: str) -> None:
    assert message in run("doctor", *model, "--config", text, code=2)


def test_engine_arguments_are_of_a_model(run: Run) -> None:
    refused = run("doctor", "--engine-args", '{"dtype": "float32"}', code=2)
    assert "name a MODEL" in refused
