"""Kernels name the columns of the tables that numpy writes; both have them from one place."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vllm_sepllm.kernels import columns as numbers
from vllm_sepllm.policy.keys import columns

ROOT = Path(__file__).resolve().parents[2]
# pointer to a row in the kernels -> the table that it is a row of
ROWS = {"request_ptr": "REQUEST", "tile_ptr": "TILE", "runs_ptr": "RUNS"}


@pytest.mark.parametrize("table", ["RUNS", "TILE", "REQUEST"])
def test_a_number_finds_the_word_that_numpy_wrote(table) -> None:
    dtype, named = getattr(columns, table), getattr(numbers, table)
    words = np.zeros(2 * named.num_columns, dtype=np.int32)
    rows = words.view(dtype)
    assert len(rows) == 2
    for name in dtype.names:
        words[:] = 0
        field = rows[name] if dtype[name].names is None else rows[name][dtype[name].names[0]]
        field[1] = 7
        assert words.nonzero()[0].tolist() == [named.num_columns + getattr(named, name)]


def additions(path: Path) -> list[tuple[str, ast.expr]]:
    """(row pointer, what is added to it) in a kernel's source."""
    return [
        (node.left.id, node.right)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Add)
        and isinstance(node.left, ast.Name)
        and node.left.id in ROWS
    ]


def test_kernels_add_a_column_of_the_pointers_table_and_nothing_else() -> None:
    found = []
    for path in (ROOT / "csrc_triton").glob("*.py"):
        for pointer, added in additions(path):
            assert isinstance(added, ast.Attribute), f"{path}:{added.lineno}"
            assert ast.unparse(added.value) == ROWS[pointer], f"{path}:{added.lineno}"
            found.append(pointer)
    assert set(found) == set(ROWS)


@pytest.mark.parametrize(
    ("kernel", "table"), [("keys.keys_kernel", "REQUEST"), ("prefill.prefill_kernel", "TILE")]
)
def test_other_columns_are_another_kernel(kernel, table) -> None:
    """Triton finds compiled kernels by a hash: of old columns it must not find any."""
    module, name = kernel.split(".")
    code = f"""
import sys
import numpy as np
from vllm_sepllm.policy.keys import columns
columns.{table} = np.dtype(columns.{table}.descr[:: int(sys.argv[1])])
from vllm_sepllm.kernels.{module} import {name}
print({name}.cache_key)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    keys = [
        subprocess.run(
            [sys.executable, "-c", code, order], check=True, capture_output=True, text=True,
            cwd=ROOT, env=env,
        ).stdout
        for order in ("1", "1", "-1")
    ]  # fmt: skip
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
