"""Names of Python packages, looked up in their source files without importing them."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

OUR_PACKAGE = "vllm_sepllm"
_OURS = Path(__file__).parents[3]
_PROPERTIES = {"property", "cached_property", "functools.cached_property"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Found:
    """Where a name is defined.

    Attributes:
        where: "module:Qualified.name" of the definition, imports and base classes followed.
        node: the function, the class, or the statement that assigns the name.
    """

    where: str
    node: ast.stmt

    @property
    def module(self) -> str:
        """The module of the definition."""
        return self.where.partition(":")[0]

    @property
    def fields(self) -> list[ast.stmt]:
        """Of a class, the statements of its body that give names a value or a type."""
        return [n for n in _statements(self.node) if isinstance(n, ast.Assign | ast.AnnAssign)]

    @property
    def signature(self) -> inspect.Signature | None:
        """What a function or method takes besides self and cls; None for a property too."""
        if not isinstance(self.node, Function):
            return None
        decorators = {ast.unparse(decorator) for decorator in self.node.decorator_list}
        return None if decorators & _PROPERTIES else _signature(self.node.args)

    @property
    def shape(self) -> str:
        """The annotation of an attribute, or what its first value says of its type."""
        if self._type is not None:
            return ast.unparse(self._type).strip("'")
        value = getattr(self.node, "value", None)
        return type(value.value if isinstance(value, ast.Constant) else value).__name__.lower()

    @property
    def type_names(self) -> set[str]:
        """Names in the annotation of an attribute, or of the class that it is made an object of."""
        nodes = ast.walk(self._type) if self._type is not None else ()
        return {node.id for node in nodes if isinstance(node, ast.Name)}

    @property
    def _type(self) -> ast.expr | None:
        value = getattr(self.node, "value", None)
        made = value.func if isinstance(value, ast.Call) else None
        written: ast.expr | None = getattr(self.node, "annotation", None)
        return written or getattr(self.node, "returns", None) or made


class SourceTree:
    """A folder that holds vLLM, such as site-packages or an unpacked wheel, and our own code.

    Names are followed through ``from ... import`` and through base classes, wherever the two
    folders have their source.

    Args:
        root: folder that holds vllm/ and other packages.
        ours: folder that holds vllm_sepllm/.
    """

    def __init__(self, root: Path, ours: Path = _OURS) -> None:
        self.root = root
        self.ours = ours
        self._parsed = cache(self._parse)

    def has_module(self, module: str) -> bool:
        """Whether ``module`` is a file or package of the tree."""
        return self.path(module) is not None

    def find(self, module: str, qualname: str) -> Found | None:
        """The definition of ``qualname``: of the module, of a class, or what a method assigns."""
        owner, _, name = qualname.rpartition(".")
        if not owner:
            return self._top(module, name)
        return next(self.definitions(module, owner, name), None)

    def definitions(self, module: str, owner: str, name: str) -> Iterator[Found]:
        """Each definition of a member by a class or by one of its bases, the nearest first."""
        for found in self.lineage(module, owner):
            if (node := members(found.node).get(name)) is not None:
                yield Found(f"{found.where}.{name}", node)

    def lineage(self, module: str, qualname: str) -> Iterator[Found]:
        """A class and the bases of the tree, depth first: the order of mixins does not matter."""
        found = self._class(module, qualname)
        if found is None:
            return
        yield found
        assert isinstance(found.node, ast.ClassDef), "_class finds classes"
        for base in found.node.bases:
            if isinstance(base, ast.Subscript):  # Generic[T]
                base = base.value
            if isinstance(base, ast.Name):
                yield from self.lineage(found.module, base.id)

    def lines(self, found: Found) -> list[str]:
        """The source of a definition; of a class its head and fields, without the methods."""
        path, node = self.path(found.module), found.node
        lines = path.read_text().splitlines() if path else []
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        if not isinstance(node, ast.ClassDef):
            return lines[first - 1 : node.end_lineno]
        kept = lines[first - 1 : node.body[0].lineno - 1]
        for field in found.fields:
            kept += lines[field.lineno - 1 : field.end_lineno]
        return kept

    # ------------------------------------------------------------------ modules

    def path(self, module: str) -> Path | None:
        """The file of a module, or None."""
        root = self.ours if module.partition(".")[0] == OUR_PACKAGE else self.root
        stem = root.joinpath(*module.split("."))
        for path in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
            if path.is_file():
                return path
        return None

    def _parse(self, module: str) -> dict[str, ast.stmt]:
        """Names at the top of a module, those below ``if`` and ``try`` included."""
        path = self.path(module)
        return {} if path is None else _bound(ast.parse(path.read_text()))

    def _top(self, module: str, name: str) -> Found | None:
        node = self._parsed(module).get(name)
        if isinstance(node, ast.ImportFrom):
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            source = self._absolute(module, node)
            if (source, original) != (module, name):  # else a package imports its own module
                return self._top(source, original)
        elif node is not None:
            return Found(f"{module}:{name}", node)
        if self.has_module(f"{module}.{name}"):
            return Found(f"{module}.{name}:", ast.Pass(lineno=1, end_lineno=0))
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self.path(module)
        is_package = path is not None and path.name == "__init__.py"
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _class(self, module: str, qualname: str) -> Found | None:
        first, *inner = qualname.split(".")
        found = self._top(module, first)
        for name in inner:
            node = None if found is None else members(found.node).get(name)
            found = Found(f"{found.where}.{name}", node) if found and node else None
        return found if found and isinstance(found.node, ast.ClassDef) else None


@cache
def members(node: ast.stmt) -> dict[str, ast.stmt]:
    """Names that a class binds, by its body and by its methods' assignments to self."""
    if not isinstance(node, ast.ClassDef):
        return {}
    assigned: dict[str, ast.stmt] = {}
    for statement in ast.walk(node):
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in attributes(statement, "self"):
                if isinstance(target.ctx, ast.Store):
                    assigned.setdefault(target.attr, statement)
    return assigned | _bound(node)


def attributes(node: ast.AST, *of: str) -> Iterator[ast.Attribute]:
    """Attributes of the names, or of what calling them returns: self.x, super().x."""
    for found in ast.walk(node):
        if isinstance(found, ast.Attribute):
            owner = found.value.func if isinstance(found.value, ast.Call) else found.value
            if isinstance(owner, ast.Name) and owner.id in of:
                yield found


def _bound(node: ast.AST) -> dict[str, ast.stmt]:
    return {name: statement for statement in _statements(node) for name in _names(statement)}


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(child)
        elif isinstance(child, ast.stmt):
            yield child


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _signature(args: ast.arguments) -> inspect.Signature:
    kind = inspect.Parameter
    names = [arg.arg for arg in [*args.posonlyargs, *args.args]]
    num_required = len(names) - len(args.defaults)
    made = [
        kind(name, kind.POSITIONAL_OR_KEYWORD, default=kind.empty if i < num_required else ...)
        for i, name in enumerate(names)
        if name not in ("self", "cls")
    ]
    made += [kind(args.vararg.arg, kind.VAR_POSITIONAL)] if args.vararg else []
    made += [
        kind(arg.arg, kind.KEYWORD_ONLY, default=kind.empty if default is None else ...)
        for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    made += [kind(args.kwarg.arg, kind.VAR_KEYWORD)] if args.kwarg else []
    return inspect.Signature(made)
