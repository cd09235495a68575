"""Which part may import what. The table is the architecture."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
US = "vllm_sepllm"
# vLLM's public names; every other name of vLLM is for the integration alone
PUBLIC_VLLM = {"vllm.LLM", "vllm.SamplingParams", "vllm.RequestOutput"}
# part -> roots it may import besides the standard library and itself
ALLOWED = {
    f"{US}/policy": {"numpy"},
    f"{US}/config.py": {"pydantic", f"{US}.policy"},
    "csrc_triton": {"torch", "triton", f"{US}.kernels"},
    f"{US}/ops": {"torch", "numpy", f"{US}.policy", f"{US}.kernels"},
    f"{US}/integration": {"torch", "numpy", "packaging", "vllm", "transformers"}
    | {f"{US}.policy", f"{US}.config", f"{US}.ops"},
    f"{US}/sample": set(),
    f"{US}/processes.py": set(),
    f"{US}/models.py": {"transformers", "tokenizers", "torch"},
    f"{US}/bench": {"torch", "triton", "numpy", "rich", "typer", "httpx", *PUBLIC_VLLM}
    | {f"{US}.{part}" for part in ("processes", "ops", "policy", "kernels")}
    | {f"{US}.register", f"{US}.integration.rigs", "matplotlib", "transformers"},
    f"{US}/eval": {"torch", "numpy", "matplotlib", "transformers", "lm_eval", "yaml", "pydantic"}
    | {f"{US}.config", f"{US}.policy", *PUBLIC_VLLM},
    f"{US}/cli": {"numpy", "rich", "typer", "transformers"}
    | {f"{US}.{part}" for part in ("__version__", "config", "policy", "sample", "eval")}
    | {f"{US}.integration"},
    f"{US}/__main__.py": {f"{US}.cli"},
    f"{US}/demo": {"rich", "openai", "transformers", *PUBLIC_VLLM}
    | {f"{US}.{part}" for part in ("processes", "models", "sample")},
}
# the plugin's entry points import the integration when vLLM calls them
FACADE = f"{US}/__init__.py"


def imported_by(tree: ast.AST) -> set[str]:
    """Dotted names that a module imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_under(name: str, roots: set[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def modules_of(part: str) -> list[Path]:
    root = ROOT / part
    return [root] if root.is_file() else sorted(root.rglob("*.py"))


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_stay_inside_the_table(part: str) -> None:
    own = part.removesuffix(".py").replace("/", ".")
    allowed = ALLOWED[part] | {own} | sys.stdlib_module_names
    for path in modules_of(part):
        for name in imported_by(ast.parse(path.read_text())):
            assert is_under(name, allowed), (
                f"{path.relative_to(ROOT)} imports {name}; {part} may import "
                f"{sorted(ALLOWED[part])} and the standard library"
            )


def test_facade_imports_nothing_heavy_at_its_top() -> None:
    body = ast.parse((ROOT / FACADE).read_text()).body
    statements = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    for name in imported_by(ast.Module(body=statements, type_ignores=[])):
        assert is_under(name, set(sys.stdlib_module_names)), f"{FACADE} imports {name}"


def test_table_covers_the_code() -> None:
    covered = [ROOT / part for part in (*ALLOWED, FACADE)]
    for path in [*(ROOT / US).rglob("*.py"), *(ROOT / "csrc_triton").rglob("*.py")]:
        real = path.resolve()
        assert any(real.is_relative_to(c) for c in covered), f"{path}: in no part of the table"


def test_the_check_sees_an_import_inside_a_function() -> None:
    tree = ast.parse("def f():\n    from vllm.config import VllmConfig")
    assert imported_by(tree) == {"vllm.config.VllmConfig"}
    assert not is_under("vllm.config.VllmConfig", PUBLIC_VLLM)


LIGHT = [US, f"{US}.config", f"{US}.models", f"{US}.cli.app"]
LIGHT += [
    ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for p in (ROOT / US / "policy").rglob("[!_]*.py")
]


@pytest.mark.parametrize("module", LIGHT)
def test_import_is_light(module: str) -> None:
    code = (
        f"import sys, {module};"
        "print(sorted({'torch', 'triton', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
