"""Hold what we lean on against the sources of a vLLM, installed or only unpacked.

``python -m vllm_sepllm.integration.contracts.check [FOLDER]``: FOLDER holds ``vllm/``, an unpacked
wheel for instance; without it, the installed one. Nothing of it is imported.
docs/upgrading-vllm.md says when to use it.
"""

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from vllm_sepllm.integration.contracts import frontend, scheduler, since, startup, worker
from vllm_sepllm.integration.contracts.contract import Contract
from vllm_sepllm.integration.contracts.derived import (
    attributes_read,
    imports,
    inheritance,
    our_files,
)
from vllm_sepllm.integration.contracts.source_tree import SourceTree

# folder of integration/ -> contracts that are written by hand for its files
BY_HAND: dict[str, tuple[Contract, ...]] = {
    "startup": startup.CONTRACTS,
    "frontend": frontend.CONTRACTS,
    "scheduler": scheduler.CONTRACTS,
    "worker": worker.CONTRACTS,
}


def contracts(tree: SourceTree) -> list[Contract]:
    """Contracts of an engine, written by hand and derived; mypy sees more."""
    return [*(contract for side in BY_HAND.values() for contract in side), *derived(tree)]


def derived(tree: SourceTree, *, rigs: bool = False) -> list[Contract]:
    """Contracts that our code states: of an engine, or of benchmarks alone."""
    files = list(our_files(tree, rigs=rigs))
    found = {*imports(tree, files), *inheritance(tree, files)}
    return sorted(found, key=lambda contract: (contract.where, contract.why))


def broken(tree: SourceTree) -> list[str]:
    """Contracts of an engine that the tree's vLLM does not keep, and new flags, one line each."""
    return [*_broken(contracts(tree), tree), *worker.new_flags(tree)]


def broken_rigs(tree: SourceTree) -> list[str]:
    """Contracts of benchmarks alone that it does not keep."""
    return _broken(derived(tree, rigs=True), tree)


def _broken(contracts: Iterable[Contract], tree: SourceTree) -> list[str]:
    return [message for contract in contracts if (message := contract.broken(tree))]


def moved(old: SourceTree, new: SourceTree) -> Iterator[str]:
    """Members that our classes inherit or override in one of two versions only."""
    before, after = (
        {contract.why: contract.where for contract in inheritance(tree, our_files(tree))}
        for tree in (old, new)
    )
    for why in sorted(before.keys() - after.keys()):
        yield f"{before[why]}: gone ({why})"
    for why in sorted(after.keys() - before.keys()):
        yield f"{after[why]}: new ({why})"


@cache
def installed() -> SourceTree:
    """The installed vLLM.

    Raises:
        ModuleNotFoundError: if none is.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("vLLM is not installed: name the folder that holds vllm/")
    return SourceTree(Path(spec.origin).parents[1])


def unpacked(root: Path) -> SourceTree:
    """The vLLM below a folder.

    Raises:
        ValueError: if it has none.
    """
    tree = SourceTree(root.resolve())
    if not tree.has_module("vllm"):
        raise ValueError(f"{root} must hold the package vllm, found no vllm/__init__.py in it")
    return tree


def changes_since(old: SourceTree, new: SourceTree) -> Iterator[str]:
    """Diffs of the code behind everything we lean on, then the names that changed beside it."""
    named = [*contracts(old), *derived(old, rigs=True)]
    found = [old.find(*contract.where.split(":")) for contract in named]
    names = {one.where for one in found if one and not one.where.endswith(":")}  # no modules
    files = [*our_files(old), *our_files(old, rigs=True)]
    names |= since.reached(old, names, attributes_read(files))
    diffs = list(since.differences(names, old, new))
    yield from diffs
    yield "Other members of these classes that changed (+ new, - gone):"
    yield "\n".join(since.other_members(names, old, new))
    yield f"{len(diffs)} of {len(names)} definitions differ"


def main() -> None:
    """Print what is broken and exit with 1 if anything is; or print differences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="holds vllm/; default: the installed")
    parser.add_argument(
        "--since", type=Path, metavar="OLD", help="print how the code behind it differs from OLD's"
    )
    arguments = parser.parse_args()
    tree = unpacked(arguments.folder) if arguments.folder else installed()
    if arguments.since:
        print("\n\n".join(changes_since(unpacked(arguments.since), tree)))
        return
    messages = [*broken(tree), *broken_rigs(tree)]
    if arguments.folder:
        messages += moved(installed(), tree)
    print("\n".join(messages) or f"all {len(contracts(tree))} contracts hold")
    sys.exit(1 if messages else 0)


if __name__ == "__main__":
    main()
