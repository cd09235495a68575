"""What a maintainer has to read of a new vLLM: the code behind what we use, and no more."""

from pathlib import Path

import pytest

from tests.support.source_trees import source_tree
from vllm_sepllm.integration.contracts import check, since

OLD = {
    "lib.py": (
        "from vllm.pool import Pool\n"
        "class Base:\n"
        "    def inherited(self) -> None: ...\n"
        "class Owner(Base):\n"
        "    def __init__(self) -> None:\n"
        "        self.pools: list[Pool] = []\n"
        "        self.spare = Pool()\n"
        "def make() -> Owner:\n"
        "    return Owner()\n"
    ),
    "pool.py": (
        "class Pool:\n"
        '    """Of blocks."""\n'
        "    size: int = 1\n"
        "    def free(self, block: int) -> None:\n"
        '        """Give it back."""\n'
        "        self.used = block\n"
        "    def other(self) -> None: ...\n"
        "    def _unused(self) -> int:\n"
        "        return 1\n"
        "class Apart:\n"
        "    def free(self) -> None: ...\n"
    ),
}
USED = {"vllm.lib:make", "vllm.pool:Pool.free", "vllm.pool:Pool.size"}


@pytest.mark.parametrize("via", ["pools", "spare"])
def test_members_of_the_types_of_attributes_are_reached(tmp_path: Path, via: str) -> None:
    """By their names, and only from a class that we lean on: nothing leads to Apart."""
    tree = source_tree(tmp_path, OLD, {})
    read = {via, "free", "inherited"}
    assert since.reached(tree, {"vllm.lib:Owner"}, read) == {
        "vllm.lib:Base.inherited",
        f"vllm.lib:Owner.{via}",
        "vllm.pool:Pool.free",
    }
    assert since.reached(tree, {"vllm.lib:Owner"}, {"free"}) == set()
    assert since.reached(tree, {"vllm.pool:Pool.size"}, {"free"}) == {"vllm.pool:Pool.free"}
    assert since.reached(tree, {"vllm.lib:make"}, read) == set()


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        ("self.used = block", "self.used = block + 1", ["vllm.pool:Pool.free"]),
        ("block: int)", "block: int, now: bool = False)", ["vllm.pool:Pool.free"]),
        ("size: int = 1", "size: list[int]", ["vllm.pool:Pool.size"]),
        ("def free", "def release", ["vllm.pool:Pool.free"]),
        ("return 1", "return 2", []),
        ("Give it back.", "Return it.", []),
        ("self.used = block", "self.used = (\n            block  # new\n        )", []),
    ],
)
def test_differences_are_of_what_is_used(
    tmp_path: Path, before: str, after: str, names: list[str]
) -> None:
    assert before in OLD["pool.py"]
    old = source_tree(tmp_path / "old", OLD, {})
    theirs = {**OLD, "pool.py": OLD["pool.py"].replace(before, after)}
    new = source_tree(tmp_path / "new", theirs, {})
    diffs = list(since.differences(USED, old, new))
    assert [diff.splitlines()[0] for diff in diffs] == [f"--- {name}" for name in names]


def test_a_diff_shows_the_code_and_what_is_gone(tmp_path: Path) -> None:
    old = source_tree(tmp_path / "old", OLD, {})
    text = OLD["pool.py"].replace("self.used = block", "self.used = -block")
    new = source_tree(tmp_path / "new", {"pool.py": text}, {})
    gone, changed = since.differences(USED - {"vllm.pool:Pool.size"}, old, new)
    assert "--- vllm.lib:make\n+++ gone" in gone
    assert "-    return Owner()" in gone
    assert "-        self.used = block\n+        self.used = -block" in changed


def test_of_other_members_the_names_are_told(tmp_path: Path) -> None:
    old = source_tree(tmp_path / "old", OLD, {})
    text = OLD["pool.py"].replace("return 1", "return 2").replace("def other", "def another")
    text = text.replace("size: int = 1", "size: int = 2")
    new = source_tree(tmp_path / "new", {**OLD, "pool.py": text}, {})
    assert list(since.other_members(USED, old, new)) == [
        "vllm.pool:Pool: +another, -other, _unused"
    ]


def test_the_whole_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One diff for a definition, by whatever names we know it."""
    monkeypatch.setattr(check, "BY_HAND", {})
    theirs = {**OLD, "alias.py": "from vllm.lib import Owner\n"}
    ours = {
        "scheduler/ours.py": "from vllm.lib import Owner\nOwner().pools[0].free(1)\n",
        "worker/ours.py": "from vllm.alias import Owner\n",
    }
    text = OLD["pool.py"].replace("= block", "= -block").replace("return 1", "return 2")
    old = source_tree(tmp_path / "old", theirs, ours)
    new = source_tree(tmp_path / "new", {**theirs, "pool.py": text}, ours)
    diff, title, others, summary = check.changes_since(old, new)
    assert diff.startswith("--- vllm.pool:Pool.free")
    assert "that changed" in title
    assert others == "vllm.pool:Pool: _unused, used"
    assert summary == "1 of 3 definitions differ"
