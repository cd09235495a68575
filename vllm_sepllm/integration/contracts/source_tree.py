"""Names of a Python package, looked up in its source files without importing them."""

import ast
import builtins
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


class SourceTree:
    """A folder that holds packages, such as site-packages or an unpacked wheel.

    Names are followed through ``from ... import`` and through base classes, wherever the folder
    has their source.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._parsed = cache(self._parse)

    def has_module(self, module: str) -> bool:
        """Whether ``module`` is a file or package of the tree."""
        return self._path(module) is not None

    def has(self, module: str, qualname: str) -> bool:
        """Whether ``module`` has ``qualname``, attributes that methods assign included."""
        *owners, name = qualname.split(".")
        if not owners:
            return self.has_module(f"{module}.{name}") or self._member(module, name) is not None
        found = self._class(module, owners)
        return found is not None and self._class_has(*found, name)

    def params(self, module: str, qualname: str) -> tuple[str, ...] | None:
        """Parameters of a function or method without self and cls; None if it is not there."""
        *owners, name = qualname.split(".")
        if not owners:
            found = self._member(module, name)
            node = found[1] if found else None
        else:
            owner = self._class(module, owners)
            node = self._method(*owner, name) if owner else None
        if not isinstance(node, Function):
            return None
        return _params(node)

    def lineage(self, module: str, name: str) -> Iterator[tuple[str, set[str]]]:
        """("module:Class", its members) of a class and of its bases, as far as the tree has them.

        Members include the attributes that methods assign.
        """
        found = self._class(module, [name])
        for where, node in self._lineage(*found) if found else ():
            yield f"{where}:{node.name}", class_members(node)

    # ------------------------------------------------------------------ modules

    def _path(self, module: str) -> Path | None:
        stem = self.root.joinpath(*module.split("."))
        for path in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
            if path.is_file():
                return path
        return None

    def _parse(self, module: str) -> dict[str, ast.AST]:
        """Names at the top of a module, those below ``if`` and ``try`` included."""
        path = self._path(module)
        if path is None:
            return {}
        return {
            name: node for node in _statements(ast.parse(path.read_text())) for name in _names(node)
        }

    def _member(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """(module that defines it, its node), imports followed."""
        node = self._parsed(module).get(name)
        if not isinstance(node, ast.ImportFrom):
            return None if node is None else (module, node)
        source = self._absolute(module, node)
        original = next(a.name for a in node.names if (a.asname or a.name) == name)
        if self.has_module(f"{source}.{original}"):
            return f"{source}.{original}", ast.Module([], [])
        return self._member(source, original)

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self._path(module)
        is_package = path is not None and path.name == "__init__.py"
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    # ------------------------------------------------------------------ classes

    def _class(self, module: str, names: list[str]) -> tuple[str, ast.ClassDef] | None:
        found = self._member(module, names[0])
        for name in names[1:]:
            if found is None or not isinstance(found[1], ast.ClassDef):
                return None
            inner = [n for n in found[1].body if isinstance(n, ast.ClassDef) and n.name == name]
            found = (found[0], inner[0]) if inner else None
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        return found[0], found[1]

    def _lineage(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and the bases of the tree, depth first: the order of mixins does not matter."""
        yield module, node
        for base in node.bases:
            if isinstance(base, ast.Subscript):  # Generic[T]
                base = base.value
            if isinstance(base, ast.Name) and (found := self._class(module, [base.id])):
                yield from self._lineage(*found)

    def _class_has(self, module: str, node: ast.ClassDef, name: str) -> bool:
        return any(
            name in class_members(owner) or self._is_inherited(where, owner, name)
            for where, owner in self._lineage(module, node)
        )

    def _is_inherited(self, module: str, node: ast.ClassDef, name: str) -> bool:
        """From a base of the standard library, such as Enum."""
        for base in node.bases:
            if isinstance(base, ast.Name):
                imported = self._parsed(module).get(base.id)
                source = imported.module if isinstance(imported, ast.ImportFrom) else None
                if source in sys.stdlib_module_names:
                    return hasattr(getattr(import_module(source), base.id), name)
                if hasattr(builtins, base.id):
                    return hasattr(getattr(builtins, base.id), name)
        return False

    def _method(self, module: str, node: ast.ClassDef, name: str) -> Function | None:
        for _, owner in self._lineage(module, node):
            for item in owner.body:
                if isinstance(item, Function) and item.name == name:
                    return item
        return None


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(child)
        elif isinstance(child, ast.stmt):
            yield child


def _names(node: ast.stmt) -> list[str]:
    """Names that a statement binds."""
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def class_members(node: ast.ClassDef) -> set[str]:
    """Names of a class's body, and attributes that its methods assign to self."""
    names = {name for item in _statements(node) for name in _names(item)}
    attributes = [n for n in ast.walk(node) if isinstance(n, ast.Attribute)]
    names |= {n.attr for n in attributes if isinstance(n.ctx, ast.Store) and _is_self(n.value)}
    return names


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _params(node: Function) -> tuple[str, ...]:
    args = node.args
    named = [*args.posonlyargs, *args.args]
    named += [args.vararg] if args.vararg else []
    named += args.kwonlyargs
    named += [args.kwarg] if args.kwarg else []
    return tuple(arg.arg for arg in named if arg.arg not in ("self", "cls"))
