"""One vLLM name that vLLM does not promise to keep, and how to see that it moved."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_sepllm.integration.contracts.source_tree import Found, SourceTree

_NONE = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Contract:
    """One vLLM name and what we expect of it.

    Attributes:
        where: "module:Qualified.name"; what instances set themselves is found too.
        why: what we do with it.
        passed: of a callable, the parameters that we pass by position; the others have defaults.
        shapes: of an attribute that we write, the annotations or kinds of value that suit us.
        override: of a method, the signature of ours that vLLM calls instead.
    """

    where: str
    why: str
    passed: tuple[str, ...] | None = None
    shapes: tuple[str, ...] = ()
    override: inspect.Signature | None = None

    def broken(self, tree: SourceTree) -> str | None:
        """What the vLLM of the tree has changed, or None if nothing."""
        found = tree.find(*self.where.split(":"))
        change = "gone" if found is None else self._changed(found)
        return f"{self.where}: {change} ({self.why})" if change else None

    def _changed(self, found: Found) -> str | None:
        if self.shapes and found.shape not in self.shapes:
            return f"is {found.shape}, we expect {' or '.join(self.shapes)}"
        taken = found.signature
        if self.passed is not None and (taken is None or not _binds(taken, self.passed)):
            return f"takes {_show(taken)}, we pass ({', '.join(self.passed)})"
        if self.override is not None and (taken is None or not accepts(self.override, taken)):
            return f"takes {_show(taken)}, ours {_show(self.override)}"
        return None


def by_hand(whys: Mapping[str, Mapping[str, str]]) -> tuple[Contract, ...]:
    """Contracts from a table: "module:Class" -> what of it -> what we do with that.

    What is a name or several ("a, b"), a call ("method(a, b)", parameters by position), or an
    attribute that we write with the shapes that suit us ("a: set[str] or list[str]").
    """
    return tuple(
        contract
        for owner, table in whys.items()
        for what, why in table.items()
        for contract in _parsed(owner, what, why)
    )


def _parsed(owner: str, what: str, why: str) -> Iterator[Contract]:
    name, _, shapes = what.partition(": ")
    if shapes:
        yield Contract(f"{owner}.{name}", why, shapes=tuple(shapes.split(" or ")))
    elif what.endswith(")"):
        name, _, passed = what[:-1].partition("(")
        yield Contract(f"{owner}.{name}", why, passed=tuple(passed.split(", ")) if passed else ())
    else:
        yield from (Contract(f"{owner}.{name}", why) for name in what.split(", "))


def accepts(ours: inspect.Signature, theirs: inspect.Signature) -> bool:
    """Whether ours takes every call that theirs takes, and understands it in the same way."""
    params = theirs.parameters.values()
    plain = [p.name for p in params if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = [p.name for p in params if p.kind is p.KEYWORD_ONLY]
    required = [p for p in (*plain, *keyword) if theirs.parameters[p].default is _NONE]
    return (
        _binds(ours, plain, keyword)
        and _binds(ours, (), [*plain, *keyword])
        and _binds(ours, (), required)
    )


def _binds(
    signature: inspect.Signature, passed: Sequence[str], keywords: Sequence[str] = ()
) -> bool:
    """Whether a call with these arguments, each called as the parameter it is meant for, fits."""
    try:
        bound = signature.bind(*passed, **{name: name for name in keywords})
    except TypeError:
        return False
    names = signature.parameters.keys() & {*passed, *keywords}
    return all(bound.arguments.get(name) == name for name in names)


def _show(signature: inspect.Signature | None) -> str:
    if signature is None:
        return "no arguments"
    return re.sub(r"=\w+", "=...", str(signature))
