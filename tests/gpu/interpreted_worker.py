"""Our GPU worker on vLLM's CPU worker."""

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.warmup import warmup_kernels
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_sepllm.integration.gpu.worker import GPUWorkerMixin


class _WarmCPUWorker(CPUWorker):
    """Warms up as vLLM's GPU worker does: with steps that no scheduler planned."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        if self.use_v2_model_runner:
            # without grammars: the interpreter refuses the masks of vLLM's kernel for them
            sample = self.sample_tokens
            warmup_kernels(self.model_runner, self.execute_model, lambda grammar: sample(None))
        return super().compile_or_warm_up_model()


class InterpretedWorker(GPUWorkerMixin, _WarmCPUWorker):
    """``GPUWorkerMixin`` comes before the worker of the platform, as in SepLLMGPUWorker."""
