"""The tiny Llama in an engine of any kind: one policy, one pair of prompts, one right answer."""

from pathlib import Path
from typing import Any

from tests.support.engine import sepllm
from tests.support.oracle import Rule, greedy
from tests.support.tiny_models import SEPARATORS, random_prompts

POLICY = {"initial_tokens": 3, "window": 16, "separators": SEPARATORS}
RULE = Rule(initial_tokens=3, window=16, separator_ids=frozenset(SEPARATORS))
STOCK: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 1 << 24,
}
ENGINE = STOCK | {"attention_backend": "sepllm", "additional_config": {"sepllm": POLICY}}
NUM_TOKENS = 12


def tiny_sepllm(**config: Any) -> dict[str, Any]:
    """Arguments that select sepllm with ``config``, for a tiny model in this process."""
    memory = {"kv_cache_memory_bytes": 1 << 26, "skip_tokenizer_init": True}
    return sepllm(separators=SEPARATORS, **config) | memory


def prompts() -> list[list[int]]:
    """Several times the window."""
    return random_prompts(150, 99)


def check(model: Path, prompt: list[int], tokens: list[int], rule: Rule = RULE) -> None:
    """The tokens are the oracle's, and full attention's are others."""
    assert len(tokens) == NUM_TOKENS
    assert tokens == greedy(model, prompt, tokens, rule)
    assert tokens != greedy(model, prompt, tokens, None), "full attention would not show"
