"""What a CUDA graph captures stays where it is, and its padding writes and reads nothing."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

import vllm
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sepllm.integration.contracts.source_tree import SourceTree
from vllm_sepllm.integration.wire.plan import attach_plan
from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.integration.worker.backend import wrap_backend, wrap_builder
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.integration.worker.gpu.builder import GPUBuilderMixin
from vllm_sepllm.ops import KeyRotation
from vllm_sepllm.policy.epochs import Renumbering
from vllm_sepllm.policy.keys.columns import REQUEST
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.step.plan import Positions, StepPlanBuilder
from vllm_sepllm.policy.visibility import Policy

POLICY = Policy(2, 6, 8)
BLOCK_SIZE, NUM_BLOCKS = 4, 20
SEPARATORS = TokenSeparators((1,))


@dataclass
class LibraryMetadata:
    """What the wrapped builder was asked for."""

    common: CommonAttentionMetadata


class LibraryBuilder(AttentionMetadataBuilder[LibraryMetadata]):
    """Stands for a backend whose graphs replay anything."""

    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LibraryMetadata:
        return LibraryMetadata(common_attn_metadata)


@pytest.fixture
def cache() -> torch.Tensor:
    return torch.arange(NUM_BLOCKS * 2 * BLOCK_SIZE * 16, dtype=torch.float32).view(
        NUM_BLOCKS, 2, BLOCK_SIZE, 16
    )


@pytest.fixture
def rotation() -> KeyRotation | None:
    """Positions are those of the text; tests of others say otherwise."""
    return None


@pytest.fixture
def builder(cache: torch.Tensor, rotation: KeyRotation | None) -> Any:
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=2, head_size=8, dtype=torch.float32
    )
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=32, max_num_seqs=8),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=None),
    )
    made = wrap_builder(LibraryBuilder, GPUBuilderMixin)(
        SepLLMSpec.from_full_attention(full, POLICY), ["layer"], config, torch.device("cpu")
    )
    layer = SimpleNamespace(
        num_heads=4, num_kv_heads=2, head_size=8, dtype=torch.float32, kv_cache=cache,
        impl=SimpleNamespace(
            prefill=lambda *arguments: None, bind=lambda kv_cache: None, rotation=rotation
        ),
    )  # fmt: skip
    made.bind(
        CurrentStep(), lambda common: [str(i) for i in common.req_idx], 0, BLOCK_SIZE, [layer]
    )
    return made


def common(lengths: list[int], num_tokens: int, num_reqs: int, num_rows: int) -> Any:
    """A batch of ``num_rows`` rows in a graph for ``num_reqs`` requests."""
    first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    first = np.concatenate([first, np.full(num_reqs - num_rows, first[-1])]).astype(np.int32)
    table = torch.arange(1, 1 + num_reqs * 4, dtype=torch.int32).view(num_reqs, 4)
    return CommonAttentionMetadata(
        query_start_loc=torch.from_numpy(first),
        query_start_loc_cpu=torch.from_numpy(first),
        seq_lens=torch.zeros(num_reqs, dtype=torch.int32),
        num_reqs=num_reqs,
        num_actual_tokens=num_tokens,
        max_query_len=max(lengths),
        max_seq_len=999,
        block_table_tensor=table,
        slot_mapping=torch.full((num_tokens,), -1),
        req_idx=np.arange(num_rows),
    )


def step(
    builder: Any,
    starts: list[int],
    lengths: list[int],
    num_tokens: int,
    num_reqs: int,
    windows: tuple[int, ...] = (),
    positions: Positions | None = None,
) -> Any:
    """Build the metadata of a step of requests whose every fifth token is a separator.

    The first of them have ``windows`` of their own.
    """
    plan = StepPlanBuilder(POLICY)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tokens = [int(i % 5 == 4) for i in range(start + length)]
        own = replace(POLICY, window=windows[row]) if row < len(windows) else POLICY
        plan.add(str(row), SeparatorIndex(own, SEPARATORS), tokens, start, length)
    output = SchedulerOutput.make_empty()
    output.total_num_scheduled_tokens = sum(lengths)
    attach_plan(output, replace(plan.build(), positions=positions))
    with builder._step.of(output):
        return builder.build(0, common(lengths, num_tokens, num_reqs, len(starts)))


def test_full_graphs_are_for_decode_alone(builder: Any) -> None:
    support = type(builder).get_cudagraph_support(None, None)
    assert support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_a_captured_graph_reads_what_later_steps_fill(builder: Any) -> None:
    captured = builder.build_for_cudagraph_capture(common([1] * 4, 4, 4, 4))
    library = captured.library.metadata.common
    later = step(builder, [3, 20, 11], [1, 1, 1], num_tokens=4, num_reqs=4)
    assert later.slots.data_ptr() == captured.slots.data_ptr()
    now = later.library.metadata.common
    assert now.seq_lens.data_ptr() == library.seq_lens.data_ptr()
    assert now.slot_mapping.data_ptr() == library.slot_mapping.data_ptr()
    assert later.library.num_tokens == captured.library.num_tokens == 4
    # a + n = 8; separators at 4, 9, 14, ...: of the second row 4, 9 and 14 are far, of the third 4
    assert now.seq_lens.tolist() == [4, 8 + 3, 8 + 1, 0]
    assert now.seq_lens_cpu_upper_bound.tolist() == [4, 11, 9, 0]
    assert now.max_seq_len == 11
    # tables [1..4], [5..8], [9..12]; entries 3, 2 + 18 % 6, 2 + 9 % 6; the padding goes nowhere
    assert captured.slots.tolist() == [1 * 4 + 3, 5 * 4 + 2, 10 * 4 + 1, -1]


def test_spills_run_before_the_forward(builder: Any, cache: torch.Tensor) -> None:
    """Token 20 overwrites token 14, a separator: entry 2 moves to entry 8 + 2 first."""
    before = cache.clone()
    step(builder, [20], [1], num_tokens=1, num_reqs=1)
    assert torch.equal(cache[3, :, 2], before[1, :, 2])
    cache[3, :, 2] = before[3, :, 2]
    assert torch.equal(cache, before)


# quarter turns: whole numbers in the cache
QUARTERS = KeyRotation(
    cos=torch.tensor([1.0, 0.0, -1.0, 0.0]).repeat(5)[:, None].repeat(1, 4),
    sin=torch.tensor([0.0, 1.0, 0.0, -1.0]).repeat(5)[:, None].repeat(1, 4),
    is_neox_style=True,
)


@pytest.mark.parametrize("rotation", [QUARTERS])
def test_an_epoch_turns_keys_before_the_spills_of_its_step(
    builder: Any, cache: torch.Tensor
) -> None:
    """Of two decodes the second begins an epoch; its token 20 overwrites a separator in entry 2,
    which is spilled as it was turned. Values stay, and so does the first request's cache."""
    renumbering = Renumbering(np.array([2, 5]), np.array([-1, -2]))
    before = cache.clone()
    step(
        builder, [11, 20], [1, 1], num_tokens=2, num_reqs=2,
        positions=Positions(np.array([0, 3]), {1: renumbering}),
    )  # fmt: skip
    blocks = cache[5:9].transpose(1, 2).reshape(-1, 2, 16)  # the second request's entries
    was = before[5:9].transpose(1, 2).reshape(-1, 2, 16)
    quarter = torch.cat([was[2, :, 4:8], -was[2, :, :4], was[2, :, 8:]], 1)
    assert torch.equal(blocks[2], quarter)
    assert torch.equal(blocks[10], quarter)
    assert torch.equal(blocks[5], torch.cat([-was[5, :, :8], was[5, :, 8:]], 1))
    others = [i for i in range(16) if i not in (2, 5, 10)]
    assert torch.equal(blocks[others], was[others])
    assert torch.equal(cache[:5], before[:5])


@pytest.mark.parametrize("rotation", [QUARTERS])
def test_warming_up_turns_nothing(builder: Any, cache: torch.Tensor) -> None:
    before = cache.clone()
    builder.warm_up(4)
    assert torch.equal(cache, before)


def read(made: Any, *columns: str) -> list[tuple[int, ...]]:
    """Columns of the requests' table, row by row."""
    rows = made.prefill.requests.numpy()
    return [tuple(row[name].item() for name in columns) for row in rows.view(REQUEST)[:, 0]]


def test_prefill_rows_are_cut_off_the_library(builder: Any) -> None:
    made = step(builder, [20, 0, 30], [1, 5, 7], num_tokens=13, num_reqs=3)
    assert made.library.num_tokens == 1 + 5  # the second is inside a + n
    part = made.library.metadata.common
    assert (part.num_reqs, part.num_actual_tokens, part.max_query_len) == (2, 6, 5)
    assert part.query_start_loc.tolist() == [0, 1, 6]
    assert part.seq_lens.tolist() == [11, 5]
    columns = ("table_row", "chunk_start", "chunk_end", "query_start")
    assert read(made, *columns) == [(2, 30, 37, 6)]
    # of positions 30 .. 36 the window keeps the last six
    assert (made.slots[6:] == -1).tolist() == [True] + [False] * 6


def test_decodes_of_a_mixed_batch_are_no_graph_to_the_wrapped_builder(
    builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer's would keep buffers for each number of them, FlashAttention's kernel allocate a
    graph's number of splits; both attributes are there in the source.
    """
    seen = []
    build = LibraryBuilder.build

    def spy(self: Any, *arguments: Any) -> LibraryMetadata:
        seen.append((self.enable_cuda_graph, self.max_num_splits))
        return build(self, *arguments)

    monkeypatch.setattr(LibraryBuilder, "build", spy)
    builder.enable_cuda_graph, builder.max_num_splits = True, 32
    step(builder, [20, 30], [1, 7], num_tokens=8, num_reqs=2)
    step(builder, [20, 30], [1, 1], num_tokens=2, num_reqs=2)
    assert seen == [(False, 0), (True, 32)]
    assert (builder.enable_cuda_graph, builder.max_num_splits) == (True, 32)
    tree = SourceTree(Path(vllm.__file__).parents[1])
    backends = "vllm.v1.attention.backends"
    assert tree.find(f"{backends}.flashinfer", "FlashInferMetadataBuilder.enable_cuda_graph")
    assert tree.find(f"{backends}.flash_attn", "FlashAttentionMetadataBuilder.max_num_splits")


def test_rows_have_windows_of_their_own(builder: Any) -> None:
    """Literal numbers: a = 2, windows 3, 100 and the engine's 6; separators at 4, 9, 14, ..."""
    made = step(builder, [12, 12, 30], [1, 1, 7], num_tokens=9, num_reqs=3, windows=(3, 100))
    part = made.library.metadata.common
    # far of the first: 4 and 9; the second is full attention; entries 2 + 10 % 3 and 12
    assert part.seq_lens.tolist() == [2 + 3 + 2, 13]
    assert made.slots[:2].tolist() == [1 * 4 + 3, (5 + 3) * 4 + 0]
    assert read(made, "table_row", "chunk_start", "window") == [(2, 30, 6)]
    made = step(builder, [30], [7], num_tokens=7, num_reqs=1, windows=(4,))
    assert read(made, "window") == [(4,)]
    assert (made.slots == -1).tolist() == [True] * 3 + [False] * 4


def test_runs_without_requests_write_nothing(builder: Any, cache: torch.Tensor) -> None:
    before = cache.clone()
    made = builder.build(0, common([3, 2], 5, 2, 2))
    assert made.slots.tolist() == [-1] * 5
    assert made.prefill is None
    builder.warm_up(4)
    assert torch.equal(cache, before)


def test_no_model_writes_the_cache_by_position() -> None:
    """FlashAttention and FlashInfer let it since vLLM 0.33."""

    class Library(AttentionBackend):
        supports_kv_cache_update_bypass = True

        @staticmethod
        def get_builder_cls() -> type[LibraryBuilder]:
            return LibraryBuilder

    ours = wrap_backend(Library, GPUBuilderMixin, POLICY)
    assert not ours.supports_kv_cache_update_bypass


def test_a_group_gets_no_metadata_of_another(builder: Any) -> None:
    """vLLM would copy it and put another block table in: spills are of one group alone."""
    assert not builder.supports_update_block_table


def test_builders_of_vllm_find_the_implementation_that_we_wrap() -> None:
    """FlashInfer's and FlashAttention's ask the layers' implementations what the layers do."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
    from vllm.v1.attention.backends.utils import find_attention_impl_variant

    from vllm_sepllm.integration.worker.gpu.impl import SepLLMGPUImpl

    wrapped = TritonAttentionImpl(4, 8, 1.0, 2, None, None, "auto")
    found = find_attention_impl_variant(SepLLMGPUImpl(wrapped), TritonAttentionImpl)
    assert found is wrapped
