"""Builders of a model runner get the plan; all stages of a pipeline sort their rows alike."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.attention.backend import AttentionMetadataBuilder
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_sepllm.integration.worker.backend import wrap_builder
from vllm_sepllm.integration.worker.builder import BuilderMixin, bind_builders
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.integration.worker.gpu.builder import GPUBuilderMixin

CONFIG: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))


def group(*builders: Any, **fields: Any) -> Any:
    given = {
        "metadata_builders": [*builders],
        "layer_names": [],
        "kv_cache_spec": SimpleNamespace(block_size=16),
        "kernel_block_size": None,
        "kernel_block_stride": 0,
        "backend": SimpleNamespace(get_name=lambda: "FLASH_ATTN"),
        "get_metadata_builder": lambda: builders[0],
    }
    return SimpleNamespace(**(given | fields))


def bind(runner: Any) -> list[BuilderMixin]:
    return bind_builders(CONFIG, runner, CurrentStep(), lambda common: [])


@pytest.mark.parametrize("theirs", [None, 4])
def test_a_stage_without_our_layers_sorts_like_the_others(theirs: int | None) -> None:
    """Model Runner V1 takes a stage's threshold from the stage's own builders, or does not sort."""
    runner: Any = GPUModelRunner.__new__(GPUModelRunner)
    full = SimpleNamespace(reorder_batch_threshold=theirs)
    runner.attn_groups = [[group(full)]]
    GPUModelRunner.calculate_reorder_batch_threshold(runner)
    assert runner.reorder_batch_threshold == theirs
    assert bind(runner) == []
    assert runner.reorder_batch_threshold == 1


def test_kernel_blocks_that_lie_apart_are_refused() -> None:
    builder = wrap_builder(AttentionMetadataBuilder, GPUBuilderMixin)
    ours = builder.__new__(builder)
    apart = group(ours, kernel_block_size=16, kernel_block_stride=6)
    with pytest.raises(ValueError, match=r"16-token blocks of FLASH_ATTN.*set --block-size 16"):
        bind(SimpleNamespace(attn_groups=[[apart]]))
