"""Our GPU worker on vLLM's CPU worker."""

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_sepllm.integration.gpu.worker import GPUWorkerMixin


class InterpretedWorker(GPUWorkerMixin, CPUWorker):
    """``GPUWorkerMixin`` comes before the worker of the platform, as in SepLLMGPUWorker."""
