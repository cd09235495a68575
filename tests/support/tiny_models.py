"""Folders of tiny random models, by the names of :mod:`tests.support.tiny_configs`.

Most have no weights (``load_format="dummy"``), none has a tokenizer unless one is written.
"""

import random
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from tests.support.tiny_configs import TINY_MODELS, llama_config

# what every engine or engine configuration of a tiny model needs
ARGUMENTS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 512,
}
# without a tokenizer separators must be token ids
SEPARATORS = [7, 11, 13]
ADDITIONAL_CONFIG = {"sepllm": {"separators": SEPARATORS, "window": 252}}


def engine_args(model: str, **arguments: Any) -> Any:
    """``EngineArgs`` of a tiny model."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=model, **(ARGUMENTS | arguments))


def selected(model: str, **arguments: Any) -> Any:
    """``EngineArgs`` of a tiny model that select sepllm."""
    given = {"attention_backend": "sepllm", "additional_config": ADDITIONAL_CONFIG}
    return engine_args(model, **(given | arguments))


def random_prompts(*lengths: int) -> list[list[int]]:
    """Token ids; about one in forty is of SEPARATORS."""
    numbers = random.Random(0)
    return [[numbers.randrange(2, 128) for _ in range(length)] for length in lengths]


def tiny_text(first: int, num_tokens: int) -> list[int]:
    """A piece of one long text of token ids; one in eight is of SEPARATORS, as in English."""
    return _text()[first : first + num_tokens]


@cache
def _text() -> list[int]:
    numbers = random.Random(0)
    words = [i for i in range(2, 128) if i not in SEPARATORS]
    return [
        numbers.choice(SEPARATORS if numbers.random() < 0.125 else words) for _ in range(40_000)
    ]


def eager_llama(num_layers: int) -> Any:
    """Hugging Face's tiny Llama, whose attention weights can be read; never far from random."""
    torch.manual_seed(0)
    config = llama_config(
        num_hidden_layers=num_layers, attn_implementation="eager", initializer_range=0.5
    )
    return transformers.LlamaForCausalLM(config).eval()


def write(kind: str, folder: Path) -> Path:
    """Write the configuration of the tiny model ``kind`` into ``folder``; return the folder."""
    config = TINY_MODELS[kind]()
    config.save_pretrained(folder)
    _register(config)
    return folder


def write_weights(kind: str, folder: Path) -> Path:
    """Write the model with random weights so large that every token depends on what it reads."""
    torch.manual_seed(0)
    config = TINY_MODELS[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    # as output weights, large embeddings would only repeat the last token
    embedding_scale = 0.05 if config.tie_word_embeddings else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, embedding_scale if "embed" in name else 0.25)
            elif name.endswith("sinks"):
                weight.normal_(0, 1.0)
    model.float().save_pretrained(folder)
    _register(config)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Give the model in ``folder`` a word a token, in text parted by blanks.

    SEPARATORS end sentences, so every rule finds them; other tokens are ``w0`` to ``w127``, but
    for the end, whose text is looked for inside of words, too.
    """
    vocabulary = {f"w{i}": i for i in range(128) if i not in (1, *SEPARATORS)} | {"</s>": 1}
    vocabulary |= dict(zip(".?!", SEPARATORS, strict=True))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.save_pretrained(folder)


def _register(config: Any) -> None:
    """Import the model's class: vLLM inspects one that is not in a process of its own, for 10 s."""
    from vllm import ModelRegistry

    (architecture,) = config.architectures
    model_class = ModelRegistry._try_load_model_cls(architecture)
    assert model_class is not None
    ModelRegistry.register_model(architecture, model_class)
