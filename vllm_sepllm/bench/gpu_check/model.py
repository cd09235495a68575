"""A random Llama whose every token depends on what it reads, and prompts for it."""

import random
from pathlib import Path
from typing import Any

import torch

SEPARATORS = (17, 19, 23)
DENSITY = 0.1  # of separators in prompts
# other ids of prompts: above special tokens of many models, and few, so that ngrams come again
WORDS = range(32, 96)
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,  # more than a step has tokens: vLLM warms up with ids that count them
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
        # answers are of the same few ids, so that ngram drafts come true
        is_answer = torch.zeros(SIZES["vocab_size"], 1)
        is_answer[[*SEPARATORS, *WORDS]] = 1
        model.lm_head.weight *= is_answer
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def check_model(folder: Path) -> None:
    """Look at the config of the model in ``folder``.

    Raises:
        OSError: if there is none.
        ValueError: if layers have sliding windows, for which the oracle has no mask.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(f"{folder} has layers with a sliding window: give a model without any")


def prompts(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    """Random token ids, one in ten a separator."""
    numbers = random.Random(seed)
    return [
        [
            numbers.choice(SEPARATORS) if numbers.random() < DENSITY else numbers.choice(WORDS)
            for _ in range(length)
        ]
        for length in lengths
    ]
