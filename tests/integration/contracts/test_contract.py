"""A contract is read from sources as Python would read it, and names what changed."""

from pathlib import Path

import pytest

from tests.support.source_trees import source_tree
from vllm_sepllm.integration.contracts.contract import Contract, accepts, by_hand
from vllm_sepllm.integration.contracts.source_tree import SourceTree

THEIRS = {
    "__init__.py": "from . import base\nfrom .base import Base as Renamed\n",
    "base.py": (
        "class Base:\n"
        "    declared: int\n"
        "    quoted: 'set[str]'\n"
        "    def __init__(self, value):\n"
        "        self.assigned, self.other = 1, 2\n"
        "        self.annotated: dict[str, int] = {}\n"
        "        self.names = set()\n"
        "        self.flag = True\n"
        "        self.items = []\n"
        "    def inherited(self, a, *rest, key=None, **kwargs): ...\n"
        "    @property\n"
        "    def computed(self) -> int: ...\n"
    ),
    "sub/derived.py": (
        "from typing import Generic\n"
        "from .. import Renamed\n"
        "class Derived(Renamed, Generic[int]):\n"
        "    @classmethod\n"
        "    async def own(cls, a, b=1): ...\n"
        "    class Inner:\n"
        "        member = 1\n"
        "if True:\n"
        "    def function(x, /, y): ...\n"
    ),
}


@pytest.fixture
def tree(tmp_path: Path) -> SourceTree:
    return source_tree(tmp_path, THEIRS, {})


@pytest.mark.parametrize(
    "expected",
    [
        "vllm:Renamed: declared",
        "vllm.sub.derived:Derived: assigned, other, own, inherited",
        "vllm.sub.derived:Derived: own(a, b)",
        "vllm.sub.derived:Derived: own(a)",
        "vllm.sub.derived:Derived: inherited(a)",
        "vllm.sub.derived:Derived.Inner: member",
        "vllm.base:Base: quoted: set[str]",
        "vllm.base:Base: annotated: list[str] or dict[str, int]",
        "vllm.base:Base: names: set",
        "vllm.base:Base: items: list",
        "vllm.base:Base: flag: bool",
        "vllm.base:Base: computed: int",
    ],
)
def test_names_are_found_where_python_finds_them(tree: SourceTree, expected: str) -> None:
    owner, _, what = expected.partition(": ")
    for contract in by_hand({owner: {what: "a test"}}):
        assert contract.broken(tree) is None


@pytest.mark.parametrize(
    ("owner", "what", "message"),
    [
        ("vllm.gone:Base", "declared", "vllm.gone:Base.declared: gone (a test)"),
        ("vllm:Base", "declared", "gone"),
        ("vllm.base:Base", "unknown", "gone"),
        ("vllm.base:Base", "unknown(a)", "gone"),
        ("vllm.base:Base", "declared()", "takes no arguments, we pass ()"),
        ("vllm.base:Base", "computed()", "takes no arguments, we pass ()"),
        ("vllm.sub.derived:Derived", "own()", "takes (a, b=...), we pass ()"),
        ("vllm.sub.derived:Derived", "own(b)", "takes (a, b=...), we pass (b)"),
        ("vllm.sub.derived:Derived", "own(a, b, c)", "takes (a, b=...), we pass (a, b, c)"),
        ("vllm.base:Base", "names: dict or list", "is set, we expect dict or list"),
        ("vllm.base:Base", "annotated: dict[str, str]", "is dict[str, int], we expect"),
    ],
)
def test_what_changed_is_named(tree: SourceTree, owner: str, what: str, message: str) -> None:
    (contract,) = by_hand({owner: {what: "a test"}})
    assert message in (contract.broken(tree) or "")


def test_functions_and_modules_are_names_too(tree: SourceTree) -> None:
    assert Contract("vllm:base", "a module").broken(tree) is None
    assert Contract("vllm:sub", "a package").broken(tree) is None
    assert Contract("vllm.sub.derived:function", "called", passed=("x", "y")).broken(tree) is None
    assert "gone" in (Contract("vllm:sub.gone", "a module").broken(tree) or "")


SAME = "self, a, b=1, *, c=None"


@pytest.mark.parametrize(
    ("ours", "theirs", "is_accepted"),
    [
        (SAME, SAME, True),
        (SAME, "self, a, b", True),
        (SAME, "self, a", True),
        ("self, a, more=0", "self, a", True),
        ("self, *args, **kwargs", SAME, True),
        ("self, a, *args, **kwargs", SAME, True),
        ("self, a", "self, a, new=None", False),
        ("self, a, more", "self, a", False),
        ("self, b, a", "self, a, b", False),
        ("self, a, renamed", "self, a, b", False),
        ("self, a, b", "self, a, b=1", False),
        ("self, a, *, b", "self, a, b", False),
        (SAME, "self, a, *, d=None", False),
        ("self, a, c", "self, a, *, c", True),
    ],
)
def test_an_override_takes_what_vllm_passes(
    tmp_path: Path, ours: str, theirs: str, is_accepted: bool
) -> None:
    text = f"class Ours:\n    def f({ours}): ...\nclass Theirs:\n    def f({theirs}): ...\n"
    tree = source_tree(tmp_path, {"both.py": text}, {})
    signatures = []
    for name in ("Ours", "Theirs"):
        found = tree.find("vllm.both", f"{name}.f")
        assert found is not None
        assert found.signature is not None
        signatures.append(found.signature)
    assert accepts(*signatures) is is_accepted
