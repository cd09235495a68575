"""What the GPU worker refuses, asserts and sets apart, asked without a GPU."""

import gc
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import clear_layer_kv_caches

from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.integration.worker.gpu import worker as gpu_worker
from vllm_sepllm.integration.worker.gpu.builder import GPUBuilderMixin
from vllm_sepllm.integration.worker.gpu.impl import SepLLMGPUImpl
from vllm_sepllm.integration.worker.gpu.profile import hold_while_profiling, key_list_bytes
from vllm_sepllm.integration.worker.gpu.worker import SepLLMGPUWorker, check_layout
from vllm_sepllm.integration.worker.host_blocks import HostBlocks
from vllm_sepllm.policy.keys.tiles import PrefillRequests, plan_tiles
from vllm_sepllm.policy.visibility import BatchPolicy, Policy


@pytest.mark.parametrize("name", [None, *KVCacheLayout.__members__])
def test_layouts_whose_blocks_hold_every_layer_are_refused(name: str | None) -> None:
    config = KVCacheConfig(1, [], [], kv_cache_layout=name)
    if name is None or not name.startswith("B"):
        check_layout(config)
        return
    with pytest.raises(ValueError, match=f"KV cache layout {name}.*unset VLLM_KV_CACHE_LAYOUT"):
        check_layout(config)


def worker(mode: CUDAGraphMode, speculative_config: Any) -> Any:
    made: Any = SepLLMGPUWorker.__new__(SepLLMGPUWorker)
    made.vllm_config = SimpleNamespace(
        speculative_config=speculative_config,
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
    )
    return made


def test_drafts_and_full_graphs_exclude_each_other(caplog: pytest.LogCaptureFixture) -> None:
    """A request with staged drafts and one token looks like a decode, and is a chunk of ours."""
    drafts = SimpleNamespace()
    with caplog.at_level(logging.INFO, "vllm.plugins.sepllm"):
        worker(CUDAGraphMode.FULL_AND_PIECEWISE, None)._check_graphs()
        assert not caplog.messages
        worker(CUDAGraphMode.PIECEWISE, drafts)._check_graphs()
        worker(CUDAGraphMode.NONE, drafts)._check_graphs()
    assert "no step is a FULL CUDA graph (cudagraph_mode PIECEWISE)" in caplog.text
    for mode in (CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY):
        with pytest.raises(AssertionError, match="get_cudagraph_support"):
            worker(mode, drafts)._check_graphs()


def config(max_num_seqs: int, max_model_len: int) -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=8192),
        model_config=SimpleNamespace(max_model_len=max_model_len),
    )


def test_key_lists_by_hand() -> None:
    """a + n + s = 4 + 252 + 1000 keys of each chunk, and the step's 8192 twice, 16 bytes each."""
    policy, gib = Policy(4, 252, 1000), 1 << 30
    assert key_list_bytes(config(256, 32768), policy, 80 * gib) == (256 * 1256 + 16384) * 16
    assert key_list_bytes(config(256, 100), policy, 80 * gib) == (256 * 100 + 16384) * 16
    assert key_list_bytes(config(9999, 100), policy, 80 * gib) == (8192 * 100 + 16384) * 16
    assert key_list_bytes(config(256, 32768), policy, 100) == 1


@pytest.mark.parametrize("chunk", [1, 7, 28, 100])
def test_no_key_list_is_longer_than_reckoned(chunk: int) -> None:
    """Every token is a separator, and the tails are full."""
    policy, num_chunks, start = Policy(4, 28, 60), 5, 500
    positions = np.arange(start - policy.window, start + chunk)
    starts = np.full(num_chunks, start)
    requests = PrefillRequests(
        table_row=np.arange(num_chunks),
        query_start=np.arange(num_chunks) * chunk,
        chunk_start=starts,
        chunk_end=starts + chunk,
        num_spilled=starts - policy.window - policy.initial_tokens,
        separators=np.tile(positions, num_chunks),
        separators_start=np.arange(num_chunks + 1) * len(positions),
    )
    tables = plan_tiles(requests, BatchPolicy.of([policy] * num_chunks, policy), 16)
    num_keys = int(tables.requests["num_keys"].sum())
    listed = 8 * num_keys + 4 * (tables.separators.size + tables.until.size)
    asked = config(num_chunks, 4096)
    asked.scheduler_config.max_num_batched_tokens = num_chunks * chunk
    assert num_keys > num_chunks * policy.num_dense
    assert listed <= key_list_bytes(asked, policy, 1 << 40)


def test_a_worker_bounds_copies_and_sets_memory_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own part of loading and of allocating; vLLM's parts are left out."""
    policy, profiled, installed = Policy(4, 252, 1000), [], []
    monkeypatch.setattr(Worker, "load_model", lambda self, **options: None)
    monkeypatch.setattr(Worker, "initialize_from_config", lambda self, config: None)
    monkeypatch.setattr(gpu_worker, "sepllm_layers", lambda *given, **options: [])
    read = SimpleNamespace(policy=policy, largest_policy=policy, max_position=None)
    monkeypatch.setattr(gpu_worker, "read_config", lambda _: read)
    monkeypatch.setattr(gpu_worker.block_copies, "install", lambda: installed.append(True))
    made = worker(CUDAGraphMode.FULL_AND_PIECEWISE, None)
    asked = config(2, 4096)
    made.vllm_config.scheduler_config = asked.scheduler_config
    made.vllm_config.model_config = asked.model_config
    made.vllm_config.compilation_config.static_forward_context = {}
    made.vllm_config.additional_config = {}
    made.use_v2_model_runner = False
    wanted = key_list_bytes(asked, policy, 1 << 40)
    made.model_runner = SimpleNamespace(
        device=torch.device("cpu"),
        profile_run=lambda: profiled.append(len(live(wanted))),
        execute_model=None,
        attn_groups=[],
    )
    made.load_model()
    made.model_runner.profile_run()
    made.initialize_from_config(KVCacheConfig(1, [], [], kv_cache_layout="LBHNC"))
    assert (installed, profiled) == ([True], [1])
    with pytest.raises(ValueError, match="KV cache layout BLHNC"):
        made.initialize_from_config(KVCacheConfig(1, [], [], kv_cache_layout="BLHNC"))


def test_memory_is_held_while_vllm_profiles() -> None:
    held = []

    class Runner:
        def profile_run(self, *, randomize_inputs: bool) -> str:
            held.append(sum(t.nbytes for t in live(123_457)))
            return f"{randomize_inputs}"

    runner = Runner()
    hold_while_profiling(runner, 123_457, torch.device("cpu"))
    assert runner.profile_run(randomize_inputs=True) == "True"
    assert held == [123_457]
    assert not live(123_457)


def live(num_bytes: int) -> list[torch.Tensor]:
    """Tensors of that size that somebody holds."""
    gc.collect()
    return [
        one for one in gc.get_objects() if type(one) is torch.Tensor and one.nbytes == num_bytes
    ]


def layer_of(cache: torch.Tensor) -> Any:
    """An attention layer of vLLM's, as far as its end is concerned."""
    wrapped = TritonAttentionImpl(4, 8, 1.0, 2, None, None, "auto")
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}
    return SimpleNamespace(impl=SepLLMGPUImpl(wrapped), kv_cache=cache, **sizes)


def test_a_model_that_outlives_its_worker_keeps_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes the caches from the layers as a worker ends (clear_layer_kv_caches)."""
    monkeypatch.setattr(Worker, "shutdown", lambda self: clear_layer_kv_caches(layers))
    cache = torch.zeros(123, 2, 4, 16)
    num_bytes = cache.nbytes
    builder: Any = GPUBuilderMixin.__new__(GPUBuilderMixin)
    layers: list[Any] = []
    made = worker(CUDAGraphMode.NONE, None)
    made._step = CurrentStep()
    made.shutdown()  # it has no caches yet
    layers = [layer_of(cache)]
    builder._layers = layers
    builder.take_layers(layers)
    made._builders = [builder]
    made._step.host_blocks = HostBlocks([cache], num_blocks=123, num_slots=1)
    del cache
    assert live(num_bytes)
    made.shutdown()
    assert layers[0].impl.num_heads == 4
    assert not live(num_bytes)
    made.shutdown()


def test_heads_wider_than_the_kernel_takes_are_refused_as_the_model_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not after vLLM has profiled, compiled and allocated for it."""
    wide = SimpleNamespace(
        layer_name="model.layers.5.self_attn.attn",
        head_size=512,
        attn_backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN"),
        impl=None,
    )
    monkeypatch.setattr(Worker, "load_model", lambda self, **options: None)
    monkeypatch.setattr(gpu_worker, "sepllm_layers", lambda *given, **options: [wide])
    monkeypatch.setattr(gpu_worker, "read_config", lambda _: SimpleNamespace(largest_policy=None))
    monkeypatch.setattr(gpu_worker, "wrap_backend", lambda *given: None)
    monkeypatch.setattr(gpu_worker, "SepLLMGPUImpl", lambda impl: impl)
    made = worker(CUDAGraphMode.NONE, None)
    made.use_v2_model_runner = False
    made.model_runner = None
    with pytest.raises(ValueError, match=r"layers\.5.*heads of 512 elements.*takes 256 at most"):
        made.load_model()
