"""The stages: what each runs, how long it may take, and why a machine leaves it out."""

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch

from vllm_sepllm.policy.visibility import Policy

# small, so that short prompts leave the window and wrap the tail of separators
POLICY = Policy(initial_tokens=4, window=60, max_separators=40)
RENUMBERED = replace(POLICY, max_position=256)  # the longest prompt has positions given anew often
LENGTHS = (700, 57, 1250, 63, 64, 65)  # below, at and beyond initial tokens and window
EAGER_SECONDS, COMPILED_SECONDS = 150.0, 240.0
PREEMPTIONS = "vllm:num_preemptions"
DRAFTED = "vllm:spec_decode_num_draft_tokens"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
CACHED = "cached tokens"
RESTORED = "vllm:sepllm_restored_tokens"
_EAGER: dict[str, Any] = {"enforce_eager": True}
# graphs of whole decode steps, and no torch.compile that could fail for reasons of its own
_GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}
# what `vllm serve` does
_COMPILED: dict[str, Any] = {"enforce_eager": False}
_NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
# stages of one attention backend say which layer must have run
CLASSES = {
    "TRITON_ATTN": "TritonAttentionBackend",
    "FLASH_ATTN": "FlashAttentionBackend",
    "FLASHINFER": "FlashInferBackend",
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What stages need to know of a machine.

    Attributes:
        kind: "cuda", "rocm" or "cpu".
        capability: of the GPU, major and minor; None without one.
        num_gpus: that torch sees.
        has_flashinfer: whether it is installed.
    """

    kind: str
    capability: tuple[int, int] | None = None
    num_gpus: int = 0
    has_flashinfer: bool = False


def this_machine() -> Machine:
    """As torch sees it."""
    if not torch.cuda.is_available():
        return Machine("cpu")
    kind = "cuda" if torch.version.hip is None else "rocm"
    capability = torch.cuda.get_device_capability()
    has_flashinfer = find_spec("flashinfer") is not None
    return Machine(kind, capability, torch.cuda.device_count(), has_flashinfer)


@dataclass(frozen=True, slots=True)
class Asked:
    """Requests of a stage, the same for stock vLLM and sepllm.

    Attributes:
        lengths: prompt tokens of requests that are sent together.
        max_tokens: of each answer.
        is_again: a second round continues the prompts of the first.
        is_repetitive: prompts end as they went on before.
    """

    lengths: tuple[int, ...] = LENGTHS
    max_tokens: int = 40
    is_again: bool = False
    is_repetitive: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """One check in a process of its own.

    Attributes:
        name: on the command line.
        what: is proved, in words.
        asked: requests; None: no engine is started.
        limit: seconds until it is ended.
        backend: attention backend of stock vLLM, which sepllm wraps; None: vLLM's choice.
        arguments: of vllm.LLM, the same on both sides.
        own: of sepllm's side alone.
        policy: of sepllm.
        proof: counter that must not be 0, or nothing of the kind has happened.
        dtype: of the model; None: the command's.
        kinds: of machines that it runs on.
    """

    name: str
    what: str
    asked: Asked | None = field(default_factory=Asked)
    limit: float = EAGER_SECONDS
    backend: str | None = None
    arguments: dict[str, Any] = field(default_factory=lambda: dict(_EAGER))
    own: dict[str, Any] = field(default_factory=dict)
    policy: Policy = POLICY
    proof: str | None = None
    dtype: str | None = None
    kinds: tuple[str, ...] = ("cuda", "rocm", "cpu")

    @property
    def has_graphs(self) -> bool:
        """Whether steps must be replayed from CUDA graphs."""
        return self.arguments.get("enforce_eager") is False


_GPUS = ("cuda", "rocm")
STAGES = (
    Stage("operations", "compiled operations load and are right", asked=None),
    Stage("eager-cpu", "no graphs, vLLM's attention for CPUs", kinds=("cpu",)),
    Stage("eager-triton", "no graphs, TRITON_ATTN", backend="TRITON_ATTN", kinds=_GPUS),
    Stage("eager-flash", "no graphs, FLASH_ATTN", backend="FLASH_ATTN", kinds=("cuda",)),
    Stage("eager-flashinfer", "no graphs, FLASHINFER", backend="FLASHINFER", kinds=("cuda",)),
    Stage(
        "exactness",
        "float32, long prompts in chunks, answers longer than the window",
        Asked((3000, 1999, 130, 61), max_tokens=100),
        backend="TRITON_ATTN",
        dtype="float32",
    ),
    Stage(
        "prefix-hits",
        "prompts that continue cached ones",
        Asked((900, 400, 131), is_again=True),
        proof=CACHED,
    ),
    Stage(
        "preemption",
        "a pool too small for its requests",
        Asked((60,) * 16, max_tokens=150),
        arguments=_EAGER | {"num_gpu_blocks_override": 24, "max_model_len": 256},
        proof=PREEMPTIONS,
    ),
    Stage(
        "host-memory",
        "evicted prefixes that come back from host memory",
        Asked((700, 400, 900, 500, 650, 800), is_again=True),
        # of six prompts the pool holds the latest
        own={"num_gpu_blocks_override": 32, "max_num_seqs": 2, "kv_offloading_size": 0.25},
        proof=RESTORED,
    ),
    Stage(
        "positions",
        "positions given anew, and keys turned to them",
        Asked((1250, 700, 255, 64), max_tokens=100),
        policy=RENUMBERED,
    ),
    Stage(
        "graphs-triton",
        "CUDA graphs of decode steps, TRITON_ATTN",
        limit=COMPILED_SECONDS,
        backend="TRITON_ATTN",
        arguments=_GRAPHS,
        kinds=_GPUS,
    ),
    Stage(
        "graphs-flash",
        "CUDA graphs of decode steps, FLASH_ATTN",
        limit=COMPILED_SECONDS,
        backend="FLASH_ATTN",
        arguments=_GRAPHS,
        kinds=("cuda",),
    ),
    Stage(
        "graphs-flashinfer",
        "CUDA graphs of decode steps, FLASHINFER",
        limit=COMPILED_SECONDS,
        backend="FLASHINFER",
        arguments=_GRAPHS,
        kinds=("cuda",),
    ),
    Stage(
        "compiled",
        "torch.compile and CUDA graphs, as vllm serve has them",
        limit=COMPILED_SECONDS,
        arguments=_COMPILED,
        kinds=_GPUS,
    ),
    Stage(
        "fp8",
        "a KV cache in fp8",
        arguments=_EAGER | {"kv_cache_dtype": "fp8"},
        kinds=_GPUS,
    ),
    Stage(
        "speculative",
        "speculative decoding with ngram drafts",
        Asked((150, 57, 700), max_tokens=120, is_repetitive=True),
        arguments=_EAGER | {"speculative_config": _NGRAM},
        proof=ACCEPTED,
        kinds=_GPUS,
    ),
    Stage(
        "tensor-parallel",
        "two GPUs, the heads of a layer split",
        limit=COMPILED_SECONDS,
        arguments=_EAGER | {"tensor_parallel_size": 2},
        kinds=_GPUS,
    ),
)
_CPU_REASONS = {
    "fp8": "sepllm refuses a quantised KV cache on CPUs",
    "speculative": "sepllm refuses speculative decoding on CPUs",
}


def left_out(stage: Stage, machine: Machine) -> str | None:
    """Why the stage makes no sense on the machine; None: it runs."""
    if machine.kind not in stage.kinds:
        if machine.kind == "rocm":
            return "on ROCm sepllm runs over TRITON_ATTN alone"
        if machine.kind == "cpu":
            return _CPU_REASONS.get(stage.name, "needs a GPU, and torch sees none")
        return "for machines without a GPU"
    if stage.name == "tensor-parallel" and machine.num_gpus < 2:
        return f"needs two GPUs, and torch sees {machine.num_gpus}"
    if stage.backend == "FLASHINFER" and not machine.has_flashinfer:
        return "flashinfer is not installed"
    if stage.name == "fp8" and machine.kind == "cuda" and (machine.capability or (0, 0)) < (8, 9):
        return f"needs compute capability 8.9, and this GPU has {machine.capability}"
    return None
