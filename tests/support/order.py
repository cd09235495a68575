"""The dearest files first, so that no process works alone at the end (a pytest plugin).

pytest-xdist hands out whole files in the order of collection (``--dist loadfile
--no-loadscope-reorder``). A file that is not named runs after those that are, which costs time at
most.
"""

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

# by the seconds of their slow tests, from `make test`
DEAREST = (
    "e2e/test_parallel.py",
    "e2e/test_oracle.py",
    "e2e/test_prefix_caching.py",
    "e2e/test_ray.py",
    "e2e/test_model_runner_v2.py",
    "examples/test_examples.py",
    "e2e/test_renumbered.py",
    "bench/gpu_check/test_command.py",
    "e2e/test_soak.py",
    "e2e/test_server.py",
    "e2e/test_engines.py",
    "eval/test_command.py",
    "e2e/test_architectures.py",
    "e2e/test_prefix_caching_layers.py",
    "e2e/test_run_batch.py",
    "e2e/test_initial_tokens.py",
    "demo/test_demo.py",
    "e2e/test_disaggregation.py",
    "e2e/test_texts.py",
    "e2e/test_bfloat16.py",
    "e2e/test_invariance.py",
    "e2e/test_memory.py",
    "e2e/test_stock_equality.py",
    "e2e/test_features.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file; the tests of a file stay in their order."""
    rank = {TESTS / name: number for number, name in enumerate(DEAREST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
