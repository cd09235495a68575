"""vLLM's CPU worker with SepLLM layers in the model."""

from typing import cast

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_sepllm.integration.wire.config import read_config
from vllm_sepllm.integration.worker.cpu.backend import SepLLMCPUBackend
from vllm_sepllm.integration.worker.cpu.builder import SepLLMCPUMetadataBuilder
from vllm_sepllm.integration.worker.cpu.impl import SepLLMCPUImpl
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.integration.worker.layers import sepllm_layers


class SepLLMCPUWorker(CPUWorker):
    """Replaces the backend of each SepLLM layer and hands the step's plan to the builders.

    The worker keeps nothing per request, so preemption, resumption and aborts need no hook.
    """

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load as vLLM does, then put ours around the implementation of each chosen layer."""
        super().load_model(load_dummy_weights=load_dummy_weights)
        config = read_config(self.vllm_config)
        backend = SepLLMCPUBackend.with_policy(config.policy)
        for layer in sepllm_layers(self.vllm_config, config):
            layer.attn_backend = backend
            layer.impl = SepLLMCPUImpl(cast(CPUAttentionBackendImpl, layer.impl))

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate as vLLM does, then show the builders where the plan is."""
        super().initialize_from_config(kv_cache_config)
        runner = self.model_runner
        # vLLM sorts a batch if one of the worker's builders asks for it; a pipeline stage without
        # a SepLLM layer has to sort alike, or the rows of two stages do not match
        runner.reorder_batch_threshold = SepLLMCPUMetadataBuilder.reorder_batch_threshold
        step = CurrentStep()
        step.plan_runs_of(runner)
        for group_id, groups in enumerate(runner.attn_groups):
            for group in groups:
                for builder in group.metadata_builders:
                    if isinstance(builder, SepLLMCPUMetadataBuilder):
                        builder.bind(step, lambda: runner.input_batch.req_ids, group_id)
