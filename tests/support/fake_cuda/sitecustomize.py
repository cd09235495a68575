"""Lets vLLM take its CUDA platform on a machine without a GPU: an H100 that nothing can run on.

Python imports this by its name at the start of every process that has the folder on its path, so
processes that vLLM starts to look at models see the same machine. What is compiled for CUDA, and
NVML, answer 0 to everything unless said otherwise.
"""

import importlib.metadata
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

COMPILED = ("_C", "_C_stable_libtorch", "_moe_C", "_moe_C_stable_libtorch", "vllm_flash_attn")


class Silent(ModuleType):
    """A module whose every function returns 0."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: 0


class Finder:
    """Finds the modules that stand for others, after their packages as ever."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self._modules = modules

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in self._modules else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it is complete, but for the one operation that vLLM asks at import."""
        if module is modules["vllm._C_stable_libtorch"]:
            import torch

            name = "_C::cutlass_scaled_mm_supports_block_fp8"
            torch.library.define(name, "(int capability) -> bool")
            torch.library.impl(name, "default", lambda capability: True)


modules = {f"vllm.{name}": Silent(name) for name in (*COMPILED, "third_party.pynvml")}
flash_attn: Any = modules["vllm.vllm_flash_attn"]
flash_attn.is_fa_version_supported = lambda *args, **kwargs: True
nvml: Any = modules["vllm.third_party.pynvml"]
nvml.NVMLError = type("NVMLError", (Exception,), {})
nvml.nvmlDeviceGetCount = lambda: 1
nvml.nvmlDeviceGetCudaComputeCapability = lambda handle: (9, 0)
nvml.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(total=80 << 30)
nvml.nvmlDeviceGetName = lambda handle: "NVIDIA H100 80GB HBM3"
sys.meta_path.insert(0, Finder(modules))  # type: ignore[arg-type]

# vLLM knows its CPU builds by their version
_version = importlib.metadata.version
importlib.metadata.version = lambda package: _version(package).removesuffix("+cpu")
