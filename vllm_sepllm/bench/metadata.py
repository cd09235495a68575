"""What a decode step costs besides its forward: planning, metadata, scheduling.

Run: ``python -m vllm_sepllm.bench.metadata [--requests 256] [--context 32768] [--json]``. Needs no
model and no GPU; one thread of one process, as in vLLM's engine core and worker.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

NUM_STEPS = 200
WARM_UP = 30
# a Llama's sizes do not matter here, beyond heads that exist
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1 << 21,
}


@dataclass(slots=True)
class Times:
    """Microseconds of each step by part."""

    parts: dict[str, list[float]]

    def run(self, part: str, action: Callable[[], object]) -> object:
        """Do it, and remember how long it took."""
        start = time.perf_counter()
        result = action()
        self.parts.setdefault(part, []).append((time.perf_counter() - start) * 1e6)
        return result

    def median(self, part: str) -> tuple[float, float, float]:
        """(p20, median, p80) of the steps after the warm-up."""
        cut = quantiles(self.parts[part][WARM_UP:], n=10)
        return cut[1], cut[4], cut[7]
