"""Contracts are read from sources as they are from the installed vLLM, and a change is seen."""

import importlib.util
from pathlib import Path

import pytest

from vllm_sepllm.integration.contracts import check as check_contracts
from vllm_sepllm.integration.contracts.check import broken, differences
from vllm_sepllm.integration.contracts.contract import Contract
from vllm_sepllm.integration.contracts.source_tree import SourceTree

SOURCES = {
    "pkg/__init__.py": "from .base import Base as Renamed\n",
    "pkg/base.py": (
        "from enum import Enum\n"
        "class Base:\n"
        "    declared: int\n"
        "    def __init__(self):\n"
        "        self.assigned, self.other = 1, 2\n"
        "    def inherited(self, a, *rest, key=None, **kwargs): ...\n"
        "class Colour(Enum):\n"
        "    RED = 1\n"
    ),
    "pkg/sub/__init__.py": "",
    "pkg/sub/derived.py": (
        "from typing import Generic\n"
        "from .. import Renamed\n"
        "from ..base import Colour\n"
        "class Derived(Renamed, Generic[int]):\n"
        "    @classmethod\n"
        "    async def own(cls, a, b=1): ...\n"
        "if True:\n"
        "    def function(x, /, y): ...\n"
    ),
}


@pytest.fixture
def tree(tmp_path: Path) -> SourceTree:
    for name, text in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return SourceTree(tmp_path)


@pytest.mark.parametrize(
    ("where", "params"),
    [
        ("pkg:Renamed.declared", None),
        ("pkg:base", None),
        ("pkg.sub.derived:Derived.own", ("a", "b")),
        ("pkg.sub.derived:Derived.inherited", ("a", "rest", "key", "kwargs")),
        ("pkg.sub.derived:Derived.assigned", None),
        ("pkg.sub.derived:Derived.other", None),
        ("pkg.sub.derived:Colour.__members__", None),
        ("pkg.sub.derived:function", ("x", "y")),
    ],
)
def test_names_are_found_where_python_finds_them(
    tree: SourceTree, where: str, params: tuple[str, ...] | None
) -> None:
    assert broken(Contract(where, "a test", params), tree) is None


@pytest.mark.parametrize(
    ("where", "params", "message"),
    [
        ("pkg.gone:Base", None, "gone"),
        ("pkg:Base.declared", None, "gone"),
        ("pkg.base:Base.unknown", None, "gone"),
        ("pkg.base:Base.unknown", ("a",), "gone"),
        ("pkg.sub.derived:function", ("x",), "takes ('x', 'y'), we expect ('x',) (a test)"),
        ("pkg.sub.derived:Derived.declared", ("x",), "takes None"),
    ],
)
def test_what_changed_is_named(
    tree: SourceTree, where: str, params: tuple[str, ...] | None, message: str
) -> None:
    assert message in (broken(Contract(where, "a test", params), tree) or "")


def installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    return Path(spec.origin).parents[1]


def test_sources_and_imports_agree_about_the_installed_vllm() -> None:
    """tests/integration/contracts/test_contracts.py says the same of the imported one."""
    assert differences(installed()) == []


def test_a_name_that_vllm_gains_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base class with a new member of the same name would call ours for something else."""
    monkeypatch.setattr(check_contracts, "_PACKAGE", tmp_path)
    (tmp_path / "ours.py").write_text(
        "from vllm.v1.core.block_pool import BlockPool, NoSuchName\n"
        "class Ours(BlockPool):\n"
        "    def get_usage(self): ...\n"
        "    def our_own(self): ...\n"
    )
    tree = SourceTree(installed())
    assert list(check_contracts.lost_imports(tree)) == [
        "ours.py: no vllm.v1.core.block_pool.NoSuchName"
    ]
    assert list(check_contracts.accidental_overrides(tree)) == [
        "ours.py: Ours.get_usage overrides vllm.v1.core.block_pool:BlockPool.get_usage unawares"
    ]


def test_a_folder_without_vllm_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold the package vllm"):
        differences(tmp_path)
