"""Shapes of models: a config.json that vLLM fills with dummy weights, and text in its ids."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_sepllm.bench.roofline import BYTES, DENSITY, LLAMA_3_8B, Transformer

SEPARATORS = (17, 19, 23)
KV_SLACK = 2048  # tokens of KV beyond the longest prompt: answers, and blocks that are not full
SIDE_BYTES = 3e9  # activations, graphs and CUDA's own, of an engine on a GPU
USABLE = 0.95  # of a GPU's memory


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model, and what its config.json has beside them."""

    sizes: Transformer
    fields: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, longest: int) -> Path:
        """Write config.json for prompts of up to ``longest`` tokens; return the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        sizes = self.sizes
        config = {
            "num_hidden_layers": sizes.num_layers,
            "hidden_size": sizes.hidden_size,
            "num_attention_heads": sizes.num_heads,
            "num_key_value_heads": sizes.num_kv_heads,
            "head_dim": sizes.head_size,
            "intermediate_size": sizes.intermediate_size,
            "vocab_size": sizes.vocab_size,
            "max_position_embeddings": longest + KV_SLACK,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        (folder / "config.json").write_text(json.dumps(config | self.fields))
        return folder

    def kv_bytes(self, longest: int) -> int:
        """Of the KV cache of each side."""
        return (longest + KV_SLACK) * self.sizes.kv_bytes

    def memory(self, longest: int) -> float:
        """Bytes of both engines on a GPU."""
        weights = (self.sizes.layer_weights + 2 * self.sizes.head_weights) * BYTES
        return 2 * (weights + self.kv_bytes(longest) + SIDE_BYTES)


_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
SHAPES = {
    "llama-3-8b": Shape(LLAMA_3_8B, _LLAMA | {"rope_theta": 500000.0}),
    "qwen3-8b": Shape(
        Transformer("Qwen3-8B", 36, 4096, 32, 8, 128, 12288, 151936),
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1000000.0},
    ),
    # no model's: to try the command on a CPU
    "tiny": Shape(Transformer("tiny", 2, 64, 4, 2, 32, 96, 16384), _LLAMA),
}


def text(vocab_size: int, num_tokens: int, seed: int) -> list[int]:
    """Random ids of which a share of DENSITY are separators."""
    gen = np.random.default_rng(seed)
    words = gen.integers(max(SEPARATORS) + 1, vocab_size, num_tokens)
    marks = gen.choice(SEPARATORS, num_tokens)
    ids: list[int] = np.where(gen.random(num_tokens) < DENSITY, marks, words).tolist()
    return ids
