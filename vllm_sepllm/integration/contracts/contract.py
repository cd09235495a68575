"""One vLLM name that vLLM does not promise to keep, and how to see that it moved."""

import inspect
import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Contract:
    """One vLLM name and what we expect of it.

    Attributes:
        where: "module:Qualified.name".
        why: what we do with it.
        params: of a callable, in order, without self and cls; None: a field or an attribute, which
            may be one that instances set themselves.
    """

    where: str
    why: str
    params: tuple[str, ...] | None = None

    def broken(self) -> str | None:
        """What changed upstream, or None if nothing did."""
        module, _, qualname = self.where.partition(":")
        owner: Any = import_module(module)
        *path, name = qualname.split(".")
        for part in path:
            owner = getattr(owner, part, None)
        if self.params is None:
            return None if _has(owner, name) else f"{self.where}: gone ({self.why})"
        target = getattr(owner, name, None)
        if target is None:
            return f"{self.where}: gone ({self.why})"
        found = tuple(p for p in inspect.signature(target).parameters if p not in ("self", "cls"))
        if found != self.params:
            return f"{self.where}: takes {found}, we expect {self.params} ({self.why})"
        return None


def fields(owner: str, why: str, *names: str) -> tuple[Contract, ...]:
    """A contract for each of several fields of ``owner``, "module:Qualified.name"."""
    return tuple(Contract(f"{owner}.{name}", why) for name in names)


def _has(owner: Any, name: str) -> bool:
    if hasattr(owner, name):
        return True
    if not isinstance(owner, type):
        return False
    # a field without a default, or one that a method assigns
    assigned = re.compile(rf"self\.{name}(: [^=\n]+)? = |self\.{name}: ")
    return any(
        name in vars(base).get("__annotations__", {}) or assigned.search(_source(base))
        for base in owner.__mro__
        if base.__module__ != "builtins"
    )


@cache
def _source(owner: type) -> str:
    return inspect.getsource(owner)
