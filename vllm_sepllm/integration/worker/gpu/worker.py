"""vLLM's GPU worker with SepLLM layers in the model, Model Runner V1 and V2."""

from collections.abc import Collection, Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.block_table import get_block_table_width
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_sepllm.integration.wire.backend_name import WRAPPED_BACKENDS
from vllm_sepllm.integration.wire.config import read_config
from vllm_sepllm.integration.worker.backend import wrap_backend
from vllm_sepllm.integration.worker.builder import BuilderMixin, bind_builders
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.integration.worker.gpu.builder import GPUBuilderMixin
from vllm_sepllm.integration.worker.gpu.impl import SepLLMGPUImpl
from vllm_sepllm.integration.worker.layers import sepllm_layers


class GPUWorkerMixin(Worker):
    """Replaces the backend of each SepLLM layer and hands the step's plan to the builders.

    The worker keeps nothing per request, so preemption, resumption and aborts need no hook.
    """

    vllm_config: VllmConfig

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load as vLLM does, then put ours around the implementation of each chosen layer.

        Raises:
            ValueError: if a layer cannot be served exactly, or its backend stores KV in an order
                that our kernels do not read.
        """
        super().load_model(load_dummy_weights=load_dummy_weights)
        config = read_config(self.vllm_config)
        self._policy = config.largest_policy
        runner: Any = self.model_runner  # vLLM types it as Model Runner V1's
        drafting: Collection[str] = ()
        if self.use_v2_model_runner and isinstance(runner.speculator, DraftModelSpeculator):
            drafting = runner.speculator.draft_attn_layer_names
        for layer in sepllm_layers(self.vllm_config, config, drafting=drafting):
            name = layer.attn_backend.get_name()
            if name not in WRAPPED_BACKENDS:
                raise ValueError(
                    f"sepllm cannot wrap the attention backend {name}, whose cache its kernels do "
                    f'not read; set {{"sepllm": {{"decode_backend": ...}}}} to one of '
                    f"{list(WRAPPED_BACKENDS)} in --additional-config"
                )
            layer.attn_backend = wrap_backend(layer.attn_backend, GPUBuilderMixin, self._policy)
            layer.impl = SepLLMGPUImpl(layer.impl)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate as vLLM does, then show builders and layers their caches and the plan."""
        super().initialize_from_config(kv_cache_config)
        self._step = CurrentStep()
        self._step.plan_runs_of(self.model_runner)
        self._builders = bind_builders(
            self.vllm_config, self.model_runner, self._step, self._request_ids
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

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Compile our kernels before the first request, and let vLLM make up steps of its own."""
        for builder in self._builders:
            assert isinstance(builder, GPUBuilderMixin), "the platform's own"
            builder.warm_up(self._block_table_width(builder))
        with self._step.warm_up(self._policy):
            times: CompilationTimes = super().compile_or_warm_up_model()
            return times


class SepLLMGPUWorker(GPUWorkerMixin):
    """The worker of CUDA and ROCm."""
