"""vLLM's CPU worker with SepLLM layers in the model."""

from typing import cast

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_sepllm.integration.wire.config import read_config
from vllm_sepllm.integration.worker.backend import wrap_backend
from vllm_sepllm.integration.worker.builder import bind_builders
from vllm_sepllm.integration.worker.cpu.builder import CPUBuilderMixin
from vllm_sepllm.integration.worker.cpu.impl import SepLLMCPUImpl
from vllm_sepllm.integration.worker.cpu.positions import shift_positions
from vllm_sepllm.integration.worker.cpu.seeds import keep_seeds_of_chunks
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.integration.worker.host_blocks import host_blocks_of
from vllm_sepllm.integration.worker.layers import sepllm_layers
from vllm_sepllm.integration.worker.rotary import renumber


class SepLLMCPUWorker(CPUWorker):
    """Replaces the backend of each SepLLM layer and hands the step's plan to the builders.

    The worker keeps nothing per request, so preemption, resumption and aborts need no hook.
    """

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load as vLLM does, then put ours around the implementation of each chosen layer."""
        super().load_model(load_dummy_weights=load_dummy_weights)
        config = read_config(self.vllm_config)
        policy = config.largest_policy
        layers = sepllm_layers(self.vllm_config, config)
        for layer in layers:
            layer.attn_backend = wrap_backend(layer.attn_backend, CPUBuilderMixin, policy)
            layer.impl = SepLLMCPUImpl(cast(CPUAttentionBackendImpl, layer.impl))
        if config.max_position is not None:
            renumber(self.model_runner, self.vllm_config, layers, config.max_position)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate as vLLM does, then show the builders where the plan is."""
        super().initialize_from_config(kv_cache_config)
        runner = self.model_runner
        step = CurrentStep()
        step.plan_runs_of(runner)
        step.host_blocks = host_blocks_of(runner, self.vllm_config, kv_cache_config)
        keep_seeds_of_chunks(runner)
        if read_config(self.vllm_config).max_position is not None:
            shift_positions(runner, step)
        bind_builders(
            self.vllm_config,
            runner,
            step,
            lambda common: runner.input_batch.req_ids[: common.num_reqs],
        )
