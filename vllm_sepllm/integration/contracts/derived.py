"""Contracts that our own code states: what it imports of vLLM, and what its classes inherit."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from vllm_sepllm.integration.contracts.contract import Contract
from vllm_sepllm.integration.contracts.source_tree import (
    OUR_PACKAGE,
    Found,
    SourceTree,
    attributes,
    members,
)

# folders that no engine loads: benchmarks, and the contracts themselves
NOT_RUNTIME = ("rigs", "contracts")


def our_files(tree: SourceTree, *, rigs: bool = False) -> Iterator[Path]:
    """The modules of the integration that an engine runs; or those of benchmarks alone."""
    package = tree.ours / OUR_PACKAGE / "integration"
    for path in sorted(package.rglob("*.py")):
        folder = path.relative_to(package).parts[0]
        if folder == "rigs" if rigs else folder not in NOT_RUNTIME:
            yield path


def imports(tree: SourceTree, files: Iterable[Path]) -> Iterator[Contract]:
    """Every name that the files import from vLLM, or read of a module that they import."""
    for path in files:
        syntax = ast.parse(path.read_text())
        modules = {}
        for module, name, local in _imported(syntax):
            yield Contract(f"{module}:{name}", f"imported by {path.name}")
            if tree.has_module(f"{module}.{name}"):
                modules[local] = f"{module}.{name}"
        for local, module in modules.items():
            for read in attributes(syntax, local):
                yield Contract(f"{module}:{read.attr}", f"read by {path.name}")


def attributes_read(files: Iterable[Path]) -> set[str]:
    """Names that the files read or write of any object."""
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _imported(syntax: ast.Module) -> Iterator[tuple[str, str, str]]:
    """(module, name, what we call it) of each name imported from vLLM."""
    for node in ast.walk(syntax):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            module, name = getattr(node, "module", None) or "", alias.name
            if isinstance(node, ast.Import):
                module, _, name = name.rpartition(".")
            if module.partition(".")[0] == "vllm":
                yield module, name, alias.asname or name


def inheritance(tree: SourceTree, files: Iterable[Path]) -> Iterator[Contract]:
    """Every member of a base class of vLLM's that a class of ours overrides, extends or uses."""
    for module, name in _our_classes(tree, files):
        lineage = list(tree.lineage(module, name))
        ours = [found for found in lineage if _is_of(OUR_PACKAGE, found)]
        for member in sorted({name for found in ours for name in _mentioned(found.node)}):
            found = list(tree.definitions(module, name, member))
            theirs = [one for one in found if _is_of("vllm", one)]
            if not theirs:
                continue
            if found[0] is theirs[0] or member.startswith("__"):
                yield Contract(theirs[0].where, f"{module}:{name}.{member} inherits it")
            else:
                why, signature = f"{found[0].where} overrides it", found[0].signature
                yield from (Contract(one.where, why, override=signature) for one in theirs)


def _our_classes(tree: SourceTree, files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for path in files:
        module = ".".join(path.relative_to(tree.ours).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                yield module, node.name


def _mentioned(node: ast.stmt) -> set[str]:
    """Names that a class binds, or reads of self, of cls and of super()."""
    return {*members(node), *(read.attr for read in attributes(node, "self", "cls", "super"))}


def _is_of(package: str, found: Found) -> bool:
    return found.module.partition(".")[0] == package
