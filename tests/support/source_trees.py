"""A vLLM and a plugin of a few lines each, for checks that read sources."""

from pathlib import Path

from vllm_sepllm.integration.contracts.source_tree import OUR_PACKAGE, SourceTree


def source_tree(folder: Path, theirs: dict[str, str], ours: dict[str, str]) -> SourceTree:
    """Write modules and return the tree of both.

    Args:
        folder: becomes theirs/ and ours/, in which every folder is a package.
        theirs: path below vllm/ -> text.
        ours: path below vllm_sepllm/integration/ -> text.
    """
    packages = {
        folder / "theirs" / "vllm": theirs,
        folder / "ours" / OUR_PACKAGE / "integration": ours,
    }
    for package, modules in packages.items():
        for name, text in {"__init__.py": "", **modules}.items():
            path = package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            (path.parent / "__init__.py").touch()
    (folder / "ours" / OUR_PACKAGE / "__init__.py").touch()
    return SourceTree(folder / "theirs", folder / "ours")
