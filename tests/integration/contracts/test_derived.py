"""What our code says of vLLM is a contract without a line written for it."""

from pathlib import Path

import pytest

from tests.support.source_trees import source_tree
from vllm_sepllm.integration.contracts import check
from vllm_sepllm.integration.contracts.source_tree import SourceTree

THEIRS = {
    "lib.py": (
        "class Base:\n"
        "    limit: int\n"
        "    supports_both: bool = False\n"
        "    def asked(self, request): ...\n"
        "    def helper(self): ...\n"
        "    def old_hook(self): ...\n"
        "    def _inner(self): ...\n"
        "    def __init__(self, config): ...\n"
    ),
    "ops.py": "def run(a, b): ...\ndef other(a): ...\n",
    "util/text.py": "def split(text): ...\n",
    "bench.py": "def only_rigs(): ...\n",
}
OURS = {
    "worker/ours.py": (
        "from vllm import ops\n"
        "import vllm.util.text as vllm_text\n"
        "from vllm.lib import Base\n"
        "class Mixin(Base):\n"
        "    def __init__(self, *args):\n"
        "        super().__init__(*args)\n"
        "    def asked(self, request):\n"
        "        ops.run(1, 2)\n"
        "        vllm_text.split('')\n"
        "        return self.helper(), self.limit, self.our_own()\n"
        "    def old_hook(self): ...\n"
        "    def our_own(self): ...\n"
        "class Ours(Mixin):\n"
        "    def asked(self, request):\n"
        "        return super()._inner()\n"
    ),
    "rigs/rig.py": "from vllm.bench import only_rigs\n",
    "patch.py": "from vllm.util import text\n",
}


@pytest.fixture(autouse=True)
def nothing_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "BY_HAND", {})


@pytest.fixture
def trees(tmp_path: Path) -> "Trees":
    return Trees(tmp_path)


class Trees:
    """The vLLM that we were written for, and others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.old = source_tree(folder / "old", THEIRS, OURS)

    def changed(self, module: str, before: str, after: str) -> SourceTree:
        """vLLM with another text in one place."""
        assert before in THEIRS[module]
        theirs = {**THEIRS, module: THEIRS[module].replace(before, after)}
        return source_tree(self.folder / "new", theirs, OURS)


def test_imports_and_inheritance_are_listed(trees: Trees) -> None:
    assert {contract.where for contract in check.contracts(trees.old)} == {
        "vllm:ops",
        "vllm.ops:run",
        "vllm.util:text",
        "vllm.util.text:split",
        "vllm.lib:Base",
        *(f"vllm.lib:Base.{name}" for name in ("__init__", "asked", "helper", "limit")),
        *(f"vllm.lib:Base.{name}" for name in ("old_hook", "_inner")),
    }
    assert check.broken(trees.old) == []
    assert list(check.moved(trees.old, trees.old)) == []


@pytest.mark.parametrize(
    ("module", "before", "after", "messages"),
    [
        ("lib.py", "class Base", "class Other", ["vllm.lib:Base: gone (imported by ours.py)"]),
        ("ops.py", "def run", "def ran", ["vllm.ops:run: gone (read by ours.py)"]),
        ("util/text.py", "def split", "def cut", ["vllm.util.text:split: gone (read by ours.py)"]),
        ("lib.py", "(self, request)", "(self, request, *, limit=None)", ["Ours", "Mixin"]),
        ("lib.py", "(self, request)", "(self, requests)", ["Ours", "Mixin"]),
    ],
)
def test_a_change_is_found_in_the_new_sources_alone(
    trees: Trees, module: str, before: str, after: str, messages: list[str]
) -> None:
    found = check.broken(trees.changed(module, before, after))
    assert len(found) == len(messages)
    for message in messages:
        assert any(message in line for line in found), found


def test_signatures_of_both_sides_are_shown(trees: Trees) -> None:
    new = trees.changed("lib.py", "(self, request)", "(self, request, limit=None)")
    assert (
        "vllm.lib:Base.asked: takes (request, limit=...), ours (request) "
        "(vllm_sepllm.integration.worker.ours:Ours.asked overrides it)"
    ) in check.broken(new)


def test_members_that_a_base_loses_or_gains_are_found(trees: Trees) -> None:
    lost = trees.changed("lib.py", "old_hook", "new_hook")
    assert list(check.moved(trees.old, lost)) == [
        "vllm.lib:Base.old_hook: gone "
        "(vllm_sepllm.integration.worker.ours:Mixin.old_hook overrides it)"
    ]
    used = trees.changed("lib.py", "helper", "assistant")
    assert [line.partition(" (")[0] for line in check.moved(trees.old, used)] == [
        "vllm.lib:Base.helper: gone"
    ] * 2  # of Mixin and of Ours
    gained = trees.changed("lib.py", "limit: int", "limit: int\n    def our_own(self): ...")
    assert list(check.moved(trees.old, gained)) == [
        "vllm.lib:Base.our_own: new "
        "(vllm_sepllm.integration.worker.ours:Mixin.our_own overrides it)"
    ]


def test_benchmarks_have_contracts_of_their_own(trees: Trees) -> None:
    new = trees.changed("bench.py", "only_rigs", "moved")
    assert check.broken(new) == []
    assert check.broken_rigs(new) == ["vllm.bench:only_rigs: gone (imported by rig.py)"]
    assert check.broken_rigs(trees.old) == []
