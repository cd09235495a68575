"""Models for engines, and text in their tokens (a pytest plugin, see conftest.py)."""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from vllm_sepllm.sample import FOLDER

Models = Callable[[str], str]


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of the converted SmolLM2-135M-Instruct; fetched on a machine's first run."""
    from vllm_sepllm.models import ensure_model

    folder = ensure_model()
    # whoever maps the file reads it in small pieces and waits for each: five times as long
    for weights in folder.glob("*.safetensors"):
        with weights.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    return folder


@pytest.fixture(scope="session")
def four_layers_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's first four layers: real weights and tokens at a seventh of the time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path_factory.mktemp("four_layers")
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, num_hidden_layers=4, dtype="float32")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(smollm2_path).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers over SmolLM2's vocabulary: for tests of memory, where answers do not count.

    Long contexts are allowed, and one token of KV is 512 bytes in float32.
    """
    from tests.support.tiny_models import llama_config

    path = tmp_path_factory.mktemp("tiny")
    vocab_size = json.loads((smollm2_path / "config.json").read_text())["vocab_size"]
    config = llama_config(
        vocab_size=vocab_size,
        hidden_size=32,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    config.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((smollm2_path / name).read_bytes())
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """``models(kind)`` is the folder of a tiny model's configuration, without weights."""
    from tests.support.tiny_models import write

    return cache(lambda kind: str(write(kind, tmp_path_factory.mktemp(kind))))


@pytest.fixture(scope="session")
def tiny_llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with weights, and a tokenizer that has a word a token."""
    from tests.support.tiny_models import write_tokenizer, write_weights

    path = write_weights("llama", tmp_path_factory.mktemp("llama"))
    write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def text_ids(smollm2_path: Path) -> list[int]:
    """The bundled documents as one sequence of about 40,000 SmolLM2 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    text = "\n\n".join(p.read_text() for p in sorted(FOLDER.glob("*.txt")))
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


@pytest.fixture(scope="session")
def excerpt(text_ids: list[int]) -> Callable[[int, int], list[int]]:
    """``excerpt(first, num_tokens)`` of the documents."""
    return lambda first, num_tokens: text_ids[first : first + num_tokens]
