"""A random Llama whose every token depends on what it reads, and prompts for it."""

import random
from pathlib import Path
from typing import Any

import torch

SEPARATORS = (17, 19, 23)
DENSITY = 0.1  # of separators in prompts
FIRST_WORD = 32  # ids below it are special tokens of many models, and SEPARATORS
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def write_model(folder: Path) -> Path:
    """Write the model with bfloat16 weights, which every dtype of a stage holds; no tokenizer."""
    import transformers

    if (folder / "model.safetensors").exists():
        return folder
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:  # large embeddings in, or positions would count for little
                weight.normal_(0, 1.0 if "embed" in name else 0.06)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def vocabulary_size(folder: Path) -> int:
    """Of the model in ``folder``, which must have full attention in every layer.

    Raises:
        ValueError: if it has sliding windows, for which the oracle has no mask.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(f"{folder} has layers with a sliding window: give a model without any")
    return int(config.vocab_size)


def prompts(vocab_size: int, lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    """Random token ids, one in ten a separator."""
    numbers = random.Random(seed)
    return [
        [
            numbers.choice(SEPARATORS)
            if numbers.random() < DENSITY
            else numbers.randrange(FIRST_WORD, vocab_size)
            for _ in range(length)
        ]
        for length in lengths
    ]
