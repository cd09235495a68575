"""Our GPU worker on vLLM's CPU worker."""

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_sepllm.integration.worker.gpu.worker import SepLLMGPUWorker


class _WarmCPUWorker(CPUWorker):
    """Warms up as vLLM's GPU worker does: with steps that no scheduler planned."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        if self.use_v2_model_runner:
            # the greedy one of vLLM's warm-ups: the interpreter refuses its other samplers
            num_tokens = self.scheduler_config.max_num_batched_tokens
            assert run_mixed_prefill_decode_warmup(
                self.model_runner, self.execute_model, self.sample_tokens, num_tokens
            )
        return super().compile_or_warm_up_model()


class InterpretedWorker(SepLLMGPUWorker, _WarmCPUWorker):
    """``SepLLMGPUWorker`` comes before the worker of the platform."""
