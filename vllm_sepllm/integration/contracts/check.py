"""Hold our contracts against the sources of a vLLM that is not installed.

``python -m vllm_sepllm.integration.contracts.check FOLDER``: FOLDER holds ``vllm/``, an unpacked
wheel for instance. Nothing of it is imported. docs/upgrading-vllm.md says when to use it.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from vllm_sepllm.integration.contracts import CONTRACTS
from vllm_sepllm.integration.contracts.contract import Contract
from vllm_sepllm.integration.contracts.source_tree import SourceTree, class_members

_PACKAGE = Path(__file__).parents[1]


def broken(contract: Contract, tree: SourceTree) -> str | None:
    """What ``Contract.broken`` would say with the tree installed, or None."""
    module, _, qualname = contract.where.partition(":")
    if not tree.has(module, qualname):
        return f"{contract.where}: gone ({contract.why})"
    found = tree.params(module, qualname)
    if contract.params is None or found == contract.params:
        return None
    return f"{contract.where}: takes {found}, we expect {contract.params} ({contract.why})"


def lost_imports(tree: SourceTree) -> Iterator[str]:
    """Names of vLLM that our modules import and the tree does not have."""
    for path, module in _our_modules():
        for source, name in _imports(module).values():
            if not tree.has(source, name):
                yield f"{path}: no {source}.{name}"


def accidental_overrides(tree: SourceTree) -> Iterator[str]:
    """Members of our classes that a base in the tree has too, though no contract says so."""
    expected = {contract.where for contract in CONTRACTS}
    for path, module in _our_modules():
        imported = _imports(module)
        for ours in [node for node in ast.walk(module) if isinstance(node, ast.ClassDef)]:
            bases = [b.id for b in ours.bases if isinstance(b, ast.Name) and b.id in imported]
            lines = [list(tree.lineage(*imported[base])) for base in bases]
            for name in sorted(class_members(ours)):
                owners = [where for line in lines for where, members in line if name in members]
                known = not owners or any(f"{where}.{name}" in expected for where in owners)
                if not known and not name.startswith("__"):
                    yield f"{path}: {ours.name}.{name} overrides {owners[0]}.{name} unawares"


def _our_modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(_PACKAGE.rglob("*.py")):
        yield path.relative_to(_PACKAGE), ast.parse(path.read_text())


def _imports(module: ast.Module) -> dict[str, tuple[str, str]]:
    """Name in our module -> (module, name) of what it imports from vLLM."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm"
        for alias in node.names
    }


def differences(root: Path) -> list[str]:
    """Every broken contract, lost import and accidental override of the vLLM below ``root``.

    Raises:
        ValueError: if ``root`` has no ``vllm`` package.
    """
    tree = SourceTree(root)
    if not tree.has_module("vllm"):
        raise ValueError(f"{root} must hold the package vllm, found no vllm/__init__.py in it")
    messages = [message for c in CONTRACTS if (message := broken(c, tree))]
    return [*messages, *lost_imports(tree), *accidental_overrides(tree)]


def main() -> None:
    """Print the differences; exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder that holds vllm/")
    found = differences(parser.parse_args().folder)
    print("\n".join(found) or f"all {len(CONTRACTS)} contracts and our imports hold")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
