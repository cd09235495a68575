"""Which part may import what. The table is the architecture."""

import ast
import re
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
    # the columns of the tables that policy writes and the kernels read: one source for both
    "csrc_triton": {"torch", "triton", f"{US}.kernels", f"{US}.policy.keys.columns"},
    f"{US}/ops": {"torch", "numpy", f"{US}.policy", f"{US}.kernels"},
    f"{US}/integration": {"torch", "numpy", "packaging", "vllm", "transformers"}
    | {f"{US}.policy", f"{US}.config", f"{US}.ops"},
    f"{US}/sample": set(),
    f"{US}/processes.py": set(),
    f"{US}/models.py": {"transformers", "tokenizers", "torch", "gguf", "numpy"},
    f"{US}/bench": {"torch", "triton", "numpy", "rich", "typer", "httpx", "psutil", *PUBLIC_VLLM}
    | {f"{US}.{part}" for part in ("processes", "ops", "policy", "kernels")}
    | {f"{US}.register", f"{US}.integration.rigs", f"{US}.integration.wire.config"}
    | {"matplotlib", "transformers"},
    f"{US}/eval": {"torch", "numpy", "matplotlib", "transformers", "lm_eval", "yaml", "pydantic"}
    | {f"{US}.config", f"{US}.policy", *PUBLIC_VLLM},
    f"{US}/cli": {"numpy", "rich", "typer", "transformers", "huggingface_hub"}
    | {f"{US}.{part}" for part in ("__version__", "config", "policy", "sample", "eval")}
    | {f"{US}.integration"},
    f"{US}/__main__.py": {f"{US}.cli"},
    f"{US}/demo": {"rich", "openai", "torch", "transformers", *PUBLIC_VLLM}
    | {f"{US}.{part}" for part in ("processes", "models", "sample")},
}
# the plugin's entry points import the integration when vLLM calls them
FACADE = f"{US}/__init__.py"

# A folder of integration/ is a process, and imports the folders named here. What crosses a border
# between processes is in wire/. Classes that vLLM loads by name are strings, not imports.
PROCESSES = {
    "wire": set[str](),
    # EngineArgs are completed in the process that takes requests in
    "startup": {"wire", "frontend"},
    "frontend": {"wire"},
    "scheduler": {"wire"},
    "worker": {"wire"},
    "contracts": set[str](),
    "rigs": {"wire", "startup", "frontend", "scheduler", "worker", "contracts"},
}
# files beside the folders, which every process needs and which import no folder
SHARED = {"log", "patch"}


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


def _package() -> dict[str, Path]:
    """Module name -> file, of every file of the package, the kernels among them."""
    found = {}
    for folder, name in ((ROOT / US, US), (ROOT / "csrc_triton", f"{US}.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


PACKAGE = _package()


def files_imported_by(tree: ast.AST) -> set[str]:
    """Modules of the package that a module imports, or imports names of."""
    found = set()
    for name in imported_by(tree):
        while name and name not in PACKAGE:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


def reachable(start: str, imports: dict[str, set[str]]) -> set[str]:
    """Modules that ``start`` imports, directly or through others."""
    found: set[str] = set()
    ahead = [start]
    while ahead:
        new = imports[ahead.pop()] - found
        found |= new
        ahead += new
    return found


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


def test_a_process_imports_what_the_table_lets_it() -> None:
    """Imports under TYPE_CHECKING and inside functions count."""
    root, prefix = ROOT / US / "integration", f"{US}.integration."
    assert {path.parent.name for path in root.glob("*/__init__.py")} == {*PROCESSES}
    assert {path.stem for path in root.glob("*.py")} == {"__init__", *SHARED}
    found = set()
    for module, path in PACKAGE.items():
        own = module.removeprefix(prefix).split(".")[0]
        if not module.startswith(prefix):
            continue
        allowed = {own} if own in SHARED else {own, *SHARED, *PROCESSES[own]}
        for name in imported_by(ast.parse(path.read_text())):
            if name.startswith(prefix) and name.removeprefix(prefix).split(".")[0] not in allowed:
                found.add(f"{module}: {name}")
    assert not found


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports under TYPE_CHECKING and inside functions count: two such files are one subject."""
    trees = {module: ast.parse(path.read_text()) for module, path in PACKAGE.items()}
    imports = {module: files_imported_by(tree) - {module} for module, tree in trees.items()}
    reached = {module: reachable(module, imports) for module in imports}
    circles = {
        tuple(sorted(other for other in found if module in reached[other]))
        for module, found in reached.items()
        if module in found
    }
    assert not circles


def test_classes_that_are_loaded_by_name_exist() -> None:
    named = re.compile(rf"({US}[\w.]*)[.:](\w+)")
    found = [
        match
        for tree in (ast.parse(path.read_text()) for path in PACKAGE.values())
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if (match := named.fullmatch(node.value)) and node.value not in PACKAGE
    ]
    assert len(found) > 5, "the pattern has lost them"
    for match in found:
        module, name = match.groups()
        body = ast.parse(PACKAGE[module].read_text()).body
        defined = {n.name for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        assert name in defined, f"{match[0]!r} names nothing"


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
