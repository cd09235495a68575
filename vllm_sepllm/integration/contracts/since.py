"""Differences in the code behind the contracts, between two versions of vLLM."""

import ast
import difflib
from collections.abc import Iterable, Iterator

from vllm_sepllm.integration.contracts.source_tree import Found, Function, SourceTree, members


def reached(tree: SourceTree, names: Iterable[str], attributes: set[str]) -> set[str]:
    """Members called like one of ``attributes``, of the classes in ``names`` and of their types.

    An attribute's annotation leads from one class to the next. What type an object of ours has is
    not worked out, so members that only share the name of one that we use come along.

    Args:
        tree: of the old version.
        names: classes, and members whose classes are meant ("module:Class.member").
        attributes: names that our code reads of any object.
    """
    todo = [*names, *(name.rpartition(".")[0] for name in names)]
    classes: set[str] = set()
    found = set()
    while todo:
        module, _, qualname = todo.pop().partition(":")
        for owner in tree.lineage(module, qualname) if qualname else ():
            if owner.where in classes:
                continue
            classes.add(owner.where)
            for name, node in members(owner.node).items():
                if name in attributes and not name.startswith("__"):  # all classes have those
                    member = Found(f"{owner.where}.{name}", node)
                    found.add(member.where)
                    todo += [f"{owner.module}:{used}" for used in member.type_names]
    return found


def differences(names: Iterable[str], old: SourceTree, new: SourceTree) -> Iterator[str]:
    """A unified diff for each definition of ``old`` that says something else in ``new``."""
    for where in sorted(names):
        before, after = (tree.find(*where.split(":")) for tree in (old, new))
        assert before is not None, f"{where} is not in the old version"
        if after is None or _code(before) != _code(after):
            there = "gone" if after is None else after.where
            was, now = old.lines(before), [] if after is None else new.lines(after)
            yield "\n".join(difflib.unified_diff(was, now, before.where, there, lineterm=""))


def other_members(names: set[str], old: SourceTree, new: SourceTree) -> Iterator[str]:
    """For each class that names mention, its changed members that names do not mention."""
    owners = {name.rpartition(".")[0] for name in names if "." in name.partition(":")[2]}
    for where in sorted(owners | names):
        before, after = (_code_of_members(tree, where) for tree in (old, new))
        signs = dict.fromkeys(after.keys() - before.keys(), "+")
        signs |= dict.fromkeys(before.keys() - after.keys(), "-")
        signs |= {name: "" for name in before.keys() & after if before[name] != after[name]}
        changed = sorted(s + name for name, s in signs.items() if f"{where}.{name}" not in names)
        if changed:
            yield f"{where}: {', '.join(changed)}"


def _code_of_members(tree: SourceTree, where: str) -> dict[str, list[str]]:
    found = tree.find(*where.split(":"))
    bound = members(found.node) if found else {}
    return {name: _code(Found(where, node)) for name, node in bound.items()}


def _code(found: Found) -> list[str]:
    """What a definition says, without comments and its docstring."""
    node = found.node
    parts: list[ast.AST] = [node]
    if isinstance(node, ast.ClassDef):
        parts = [*node.decorator_list, *node.bases, *found.fields]
    elif isinstance(node, Function):
        is_documented = ast.get_docstring(node) is not None
        parts = [*node.decorator_list, node.args, *node.body[is_documented:]]
    return [ast.unparse(part) for part in parts]
