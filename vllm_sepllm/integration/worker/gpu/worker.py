"""vLLM's GPU worker with SepLLM layers in the model, Model Runner V1 and V2."""

from collections.abc import Collection, Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.block_table import get_block_table_width
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_sepllm import ops
from vllm_sepllm.integration.log import logger
from vllm_sepllm.integration.wire.backend_name import WRAPPED_BACKENDS
from vllm_sepllm.integration.wire.config import read_config
from vllm_sepllm.integration.worker.backend import wrap_backend
from vllm_sepllm.integration.worker.builder import BuilderMixin, bind_builders
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.integration.worker.gpu import block_copies
from vllm_sepllm.integration.worker.gpu.builder import GPUBuilderMixin
from vllm_sepllm.integration.worker.gpu.impl import SepLLMGPUImpl
from vllm_sepllm.integration.worker.gpu.positions import shift_positions
from vllm_sepllm.integration.worker.gpu.profile import hold_while_profiling, key_list_bytes
from vllm_sepllm.integration.worker.host_blocks import host_blocks_of
from vllm_sepllm.integration.worker.layers import sepllm_layers
from vllm_sepllm.integration.worker.rotary import renumber


class SepLLMGPUWorker(Worker):
    """Replaces the backend of each SepLLM layer and hands the step's plan to the builders.

    The worker keeps nothing per request, so preemption, resumption and aborts need no hook.
    """

    vllm_config: VllmConfig
    # until there are caches
    _builders: Sequence[BuilderMixin] = ()

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load as vLLM does, then put ours around the implementation of each chosen layer.

        Raises:
            ValueError: if a layer cannot be served exactly, its heads are too wide, or its backend
                stores KV in an order that our kernels do not read.
        """
        super().load_model(load_dummy_weights=load_dummy_weights)
        config = read_config(self.vllm_config)
        self._policy = config.largest_policy
        runner: Any = self.model_runner  # vLLM types it as Model Runner V1's
        drafting: Collection[str] = ()
        if self.use_v2_model_runner and isinstance(runner.speculator, DraftModelSpeculator):
            drafting = runner.speculator.draft_attn_layer_names
        layers = sepllm_layers(self.vllm_config, config, drafting=drafting)
        for layer in layers:
            name = layer.attn_backend.get_name()
            if name not in WRAPPED_BACKENDS:
                raise ValueError(
                    f"sepllm cannot wrap the attention backend {name}, whose cache its kernels do "
                    f'not read; set {{"sepllm": {{"decode_backend": ...}}}} to one of '
                    f"{list(WRAPPED_BACKENDS)} in --additional-config"
                )
            if layer.head_size > ops.MAX_HEAD_SIZE:  # Gemma-4's global layers
                raise ValueError(
                    f"layer {layer.layer_name} has heads of {layer.head_size} elements, and "
                    f"sepllm's kernel for GPUs takes {ops.MAX_HEAD_SIZE} at most; serve this model "
                    "without --attention-backend sepllm"
                )
            layer.attn_backend = wrap_backend(layer.attn_backend, GPUBuilderMixin, self._policy)
            layer.impl = SepLLMGPUImpl(layer.impl)
        self._step = CurrentStep()
        if config.max_position is not None:
            renumber(runner, self.vllm_config, layers, config.max_position)
            # before any graph is captured, those that vLLM makes to measure them included
            shift_positions(runner, self._step)
        block_copies.install()
        device_bytes = current_platform.get_device_total_memory()
        num_bytes = key_list_bytes(self.vllm_config, self._policy, device_bytes)
        hold_while_profiling(runner, num_bytes, runner.device)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate as vLLM does, then show builders and layers their caches and the plan.

        Raises:
            ValueError: if the blocks of all layers lie together, or kernel blocks apart.
        """
        check_layout(kv_cache_config)
        super().initialize_from_config(kv_cache_config)
        self._check_graphs()
        self._step.plan_runs_of(self.model_runner)
        self._step.host_blocks = host_blocks_of(
            self.model_runner, self.vllm_config, kv_cache_config
        )
        self._builders = bind_builders(
            self.vllm_config, self.model_runner, self._step, self._request_ids
        )

    def _check_graphs(self) -> None:
        """With drafts no step may be a FULL graph, which GPUBuilderMixin's support sees to.

        A request whose drafts wait in staging may have one token in a step, and looks like a decode
        to vLLM; it is a prefill chunk of ours, which a graph would leave out.
        """
        if self.vllm_config.speculative_config is None:
            return
        mode = self.vllm_config.compilation_config.cudagraph_mode
        assert not mode.has_full_cudagraphs(), "GPUBuilderMixin.get_cudagraph_support forbids it"
        logger.info(
            "sepllm: with speculative decoding no step is a FULL CUDA graph (cudagraph_mode %s).",
            mode.name,
        )

    def _block_table_width(self, builder: BuilderMixin) -> int:
        spec, max_model_len = builder.kv_cache_spec, self.vllm_config.model_config.max_model_len
        return get_block_table_width(
            spec.max_num_blocks_per_req(self.vllm_config, max_model_len),
            spec.block_size,
            token_alignment=spec.block_table_token_alignment,
        )

    def _request_ids(self, common: CommonAttentionMetadata) -> Sequence[str]:
        """The requests of a batch, row by row; rows that pad a CUDA graph have none."""
        runner: Any = self.model_runner
        if self.use_v2_model_runner:
            assert common.req_idx is not None, "Model Runner V2 says whose rows they are"
            names = runner.req_states.index_to_req_id
            return [names[index] for index in common.req_idx.tolist()]
        request_ids: list[str] = runner.input_batch.req_ids
        return request_ids[: common.num_reqs]

    def shutdown(self) -> None:
        """Let go of the KV caches before vLLM frees what it holds of them.

        It says itself that a model may outlive its runner (clear_layer_kv_caches), and layers know
        their caches through ours, too.
        """
        host = self._step.host_blocks if hasattr(self, "_step") else None  # loading may have failed
        for builder in self._builders:
            assert isinstance(builder, GPUBuilderMixin), "the platform's own"
            builder.release()
        self._builders = ()
        if host is not None:
            host.release()
        super().shutdown()  # waits for the device
        if host is not None:
            host.unpin()

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Compile our kernels before the first request, and let vLLM make up steps of its own."""
        for builder in self._builders:
            assert isinstance(builder, GPUBuilderMixin), "the platform's own"
            builder.warm_up(self._block_table_width(builder))
        with self._step.warm_up(self._policy):
            times: CompilationTimes = super().compile_or_warm_up_model()
            return times


def check_layout(kv_cache_config: KVCacheConfig) -> None:
    """Refuse KV cache layouts in which a block is one piece for all layers (vLLM's B...).

    Raises:
        ValueError: naming the remedy.
    """
    name = kv_cache_config.kv_cache_layout
    if name is not None and KVCacheLayout[name].is_block_outermost:
        raise ValueError(
            f"sepllm does not support the KV cache layout {name}, where a block holds every layer, "
            "and with which its copies never ran: unset VLLM_KV_CACHE_LAYOUT, or serve this model "
            "without --attention-backend sepllm"
        )
