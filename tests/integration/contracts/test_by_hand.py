"""Names that are written by hand: each is used by the side that it is written for."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.support.source_trees import source_tree
from vllm_sepllm.integration.contracts import check, worker
from vllm_sepllm.integration.contracts.contract import by_hand
from vllm_sepllm.integration.contracts.source_tree import SourceTree, members


def names_used(files: Iterator[Path]) -> set[str]:
    """Attributes, keywords of calls, and strings that name a member to wrap."""
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return used | {text for text in texts if isinstance(text, str)}


def files_of(tree: SourceTree, side: str) -> Iterator[Path]:
    """The side's own files and those that every process has."""
    package = tree.ours / "vllm_sepllm" / "integration"
    yield from [*package.glob("*.py"), *(package / "wire").rglob("*.py")]
    yield from (package / side).rglob("*.py")


@pytest.mark.parametrize("side", check.BY_HAND)
def test_no_entry_has_lost_its_use(side: str) -> None:
    used = names_used(files_of(check.installed(), side))
    stale = [c.where for c in check.BY_HAND[side] if re.split("[.:]", c.where)[-1] not in used]
    assert not stale, f"in contracts/{side}.py, but nowhere in {side}/ or wire/: {stale}"


def test_a_stale_entry_is_seen(tmp_path: Path) -> None:
    """Neither a comment, a longer name nor another side's use keep it."""
    ours = {
        "worker/a.py": 'def free(pool):\n    """Frees."""\n    return pool.free_blocks  # free\n',
        "scheduler/b.py": "pool.free(block=1)\nsetattr(pool, 'wrapped', 0)\n",
    }
    tree = source_tree(tmp_path, {}, ours)
    assert "free" in names_used(files_of(tree, "scheduler"))
    assert {"block", "wrapped"} <= names_used(files_of(tree, "scheduler"))
    assert names_used(files_of(tree, "worker")) == {"free_blocks", "Frees."}


def test_no_entry_is_written_twice() -> None:
    where = [contract.where for side in check.BY_HAND.values() for contract in side]
    assert sorted(where) == sorted(set(where))


def test_a_new_flag_of_a_wrapped_backend_is_seen(tmp_path: Path) -> None:
    module = "v1/attention/backends/flash_attn.py"
    text = "class FlashAttentionBackend:\n    supports_sink = True\n    supports_new: bool = True\n"
    tree = source_tree(tmp_path, {module: text}, {})
    assert list(worker.new_flags(tree)) == [
        "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend.supports_new: new, "
        "what do our layers answer?"
    ]


def test_every_known_flag_is_one() -> None:
    tree = check.installed()
    lineages = [found for owner in worker.WRAPPED for found in tree.lineage(*owner.split(":"))]
    flags = {name for found in lineages for name in members(found.node)}
    assert not set(worker.FLAGS) - flags


def test_a_shape_that_0_33_changed_is_seen(tmp_path: Path) -> None:
    text = "class Scheduler:\n    def __init__(self):\n        self.errors: dict[str, E] = {}\n"
    tree = source_tree(tmp_path, {"sched.py": text}, {})
    (contract,) = by_hand({"vllm.sched:Scheduler": {"errors: set[str]": "filled"}})
    assert contract.broken(tree) == (
        "vllm.sched:Scheduler.errors: is dict[str, E], we expect set[str] (filled)"
    )
