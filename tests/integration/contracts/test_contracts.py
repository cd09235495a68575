"""The installed vLLM is what our seam was written against, and the list of what we need whole."""

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm_sepllm.integration
from vllm_sepllm.integration.contracts import CONTRACTS
from vllm_sepllm.integration.contracts.contract import Contract

PACKAGE = Path(vllm_sepllm.integration.__file__).parent
MODULES = [
    ".".join(("vllm_sepllm.integration", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
]
# what every dataclass, abstract class or class below a protocol has of its own
GENERATED = {"__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__"}
GENERATED |= {"_abc_impl", "_is_protocol"}


def test_vllm_still_has_what_we_use() -> None:
    broken = [message for contract in CONTRACTS if (message := contract.broken())]
    assert not broken, "\n".join(broken)


def test_no_entry_is_written_twice() -> None:
    where = [contract.where for contract in CONTRACTS]
    assert sorted(where) == sorted(set(where))


def test_no_entry_has_lost_its_use() -> None:
    users = [p for p in PACKAGE.rglob("*.py") if not p.name.startswith("contract")]
    source = "".join(p.read_text() for p in users)
    for contract in CONTRACTS:
        name = contract.where.rpartition(":")[2].rpartition(".")[2]
        assert name in source or contract.why.startswith("vLLM calls it"), contract.where


def classes() -> Iterator[type]:
    """Our classes that derive from a class of vLLM's."""
    for name in MODULES:
        for value in vars(import_module(name)).values():
            if isinstance(value, type) and value.__module__ == name and vllm_bases(value):
                yield value


def vllm_bases(ours: type) -> list[type]:
    return [base for base in ours.__mro__[1:] if base.__module__.startswith("vllm.")]


def overrides() -> Iterator[tuple[type, str, str]]:
    """(our class, member, "module:Class.member" of the vLLM class that ours comes before)."""
    for ours in classes():
        for member in vars(ours):
            if member in GENERATED or (member.startswith("__") and member.endswith("__")):
                continue
            for base in vllm_bases(ours):
                if member in vars(base):
                    yield ours, member, f"{base.__module__}:{base.__qualname__}.{member}"
                    break


def test_every_override_has_an_entry() -> None:
    found = list(overrides())
    assert len(found) > 15, "the walk has lost our classes"
    known = {contract.where for contract in CONTRACTS}
    missing = [
        f"{o.__name__}.{member}: {where}" for o, member, where in found if where not in known
    ]
    assert not missing, "\n".join(missing)


def test_overrides_take_what_vllm_passes() -> None:
    params = {contract.where: contract.params for contract in CONTRACTS}
    for ours, member, where in overrides():
        if params[where] is None:
            continue
        taken = inspect.signature(getattr(ours, member)).parameters
        names = tuple(name for name in taken if name not in ("self", "cls"))
        assert names == params[where], f"{ours.__name__}.{member} takes {names}"


def imported(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vllm"):
            if node.module.startswith("vllm_sepllm"):
                continue
            for alias in node.names:
                yield node.module, alias.name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_every_imported_function_has_an_entry_with_its_parameters(path: Path) -> None:
    called = {contract.where for contract in CONTRACTS if contract.params is not None}
    for module, name in imported(path):
        target: Any = getattr(import_module(module), name)
        if inspect.isfunction(target):
            assert f"{module}:{name}" in called, f"{path.name} imports {name} from {module}"


class Sample:
    """Stands for a class of vLLM's."""

    declared: int

    def __init__(self) -> None:
        self.assigned = 1


@pytest.mark.parametrize(
    ("where", "params", "message"),
    [
        ("vllm.logger:no_such_function", ("name",), "gone"),
        ("vllm.logger:NoClass.method", ("name",), "gone"),
        ("vllm.logger:NoClass.field", None, "gone"),
        (
            "vllm.logger:init_logger",
            ("name", "level"),
            "takes ('name',), we expect ('name', 'level')",
        ),
        ("vllm.v1.request:Request.no_such_field", None, "gone"),
    ],
)
def test_the_check_can_fail(where: str, params: tuple[str, ...] | None, message: str) -> None:
    broken = Contract(where, "a test", params).broken()
    assert broken is not None
    assert message in broken


@pytest.mark.parametrize(("name", "is_there"), [("declared", 1), ("assigned", 1), ("other", 0)])
def test_attributes_are_found_where_they_are_set(name: str, is_there: bool) -> None:
    message = Contract(f"{__name__}:Sample.{name}", "a test").broken()
    assert (message is None) == is_there
