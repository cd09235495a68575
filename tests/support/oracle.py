"""The independent oracle: Hugging Face transformers, float32, eager, an explicit 4D mask.

It shares no code with the engine side: the mask is the formula of the paper, spelled out again.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM

from tests.support.engine import Answer, Engine

# float32 on both sides; what remains is the order of sums. Design: 3e-5 over 30 layers.
TOLERANCE = 1e-3
# queries whose weights are in memory together where there are epochs
BLOCK = 512


@dataclass(frozen=True)
class Rule:
    """The rule as the oracle applies it; ``full_layers`` counts from 0.

    Positions are renumbered at ``max_position``, in Llamas alone; None: they are those of the text.
    With ``interval`` the tokens at its multiples are the separators, whatever their ids. A token of
    ``line_breaks`` is one behind a token of ``closers``.
    """

    initial_tokens: int
    window: int
    separator_ids: frozenset[int]
    max_separators: int | None = None
    full_layers: frozenset[int] = frozenset()
    interval: int | None = None
    line_breaks: frozenset[int] = frozenset()
    closers: frozenset[int] = frozenset()
    max_position: int | None = None


def rule_of(made: Engine) -> Rule:
    """What the engine says it does."""
    config = made.engine.vllm_config.additional_config["sepllm"]
    separators = config.get("separators", ())
    if not isinstance(separators, dict):
        separators = {"token_ids": separators, "line_breaks": (), "closers": ()}
    return Rule(
        initial_tokens=config["initial_tokens"],
        window=config["window"],
        separator_ids=frozenset(separators["token_ids"]),
        line_breaks=frozenset(separators["line_breaks"]),
        closers=frozenset(separators["closers"]),
        max_separators=config["max_separators"],
        full_layers=frozenset(config["full_layers"]),
        interval=config.get("interval"),
        max_position=config.get("max_position"),
    )


def causal_mask(num_tokens: int) -> torch.Tensor:
    """Full attention: [num_tokens, num_tokens] bool."""
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()


def sepllm_mask(token_ids: Sequence[int], rule: Rule, first: int = 0) -> torch.Tensor:
    """The SepLLM rule for queries from ``first`` on: [num_tokens - first, num_tokens] bool."""
    position = torch.arange(len(token_ids), dtype=torch.int32)
    distance = position[first:, None] - position[None, :]
    is_separator = separators(torch.tensor(list(token_ids)), rule)
    is_initial = position < rule.initial_tokens
    is_kept = is_separator & ~is_initial & (distance >= rule.window)
    if rule.max_separators is not None:
        # of each row the latest: counted from the right, itself included
        is_kept &= is_kept.flip(1).cumsum(1, dtype=torch.int32).flip(1) <= rule.max_separators
    return (distance >= 0) & (is_initial | (distance < rule.window) | is_kept)


def separators(token_ids: torch.Tensor, rule: Rule) -> torch.Tensor:
    """[num_tokens] bool."""
    if rule.interval is not None:
        return torch.arange(len(token_ids)) % rule.interval == 0

    def is_one_of(ids: frozenset[int]) -> torch.Tensor:
        return torch.isin(token_ids, torch.tensor(sorted(ids), dtype=torch.int64))

    # the first token is behind none
    is_behind_closer = is_one_of(rule.closers).roll(1)
    is_behind_closer[:1] = False
    return is_one_of(rule.separator_ids) | (is_one_of(rule.line_breaks) & is_behind_closer)


@lru_cache(maxsize=2)
def load_model(path: Path) -> torch.nn.Module:
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def log_probabilities(
    path: Path, token_ids: Sequence[int], rule: Rule | None, first: int = 0
) -> torch.Tensor:
    """What the model thinks after each token from ``first`` on: [num_tokens, vocab_size] float32.

    ``rule`` None is full attention. Sliding-window layers keep their window under any rule.
    """
    model = load_model(path)
    ids = torch.tensor([list(token_ids)])
    if rule is not None and rule.max_position is not None:
        epochs = epochs_of(token_ids, rule)
        with _attention_in_epochs(model, epochs):
            logits = model(ids, use_cache=False, logits_to_keep=len(token_ids) - first).logits[0]
        return logits.float().log_softmax(dim=-1)
    full = causal_mask(len(token_ids))
    sparse = full if rule is None else sepllm_mask(token_ids, rule)
    kinds = getattr(model.config, "layer_types", None)
    handles = []
    for index, attention in enumerate(_attention_modules(model)):
        mask = full if rule is None or index in rule.full_layers else sparse
        if kinds is not None and kinds[index] == "sliding_attention":
            mask = full.triu(1 - model.config.sliding_window)
        bias = _bias(mask)
        handles.append(
            attention.register_forward_pre_hook(
                lambda _module, args, kwargs, bias=bias: (args, kwargs | {"attention_mask": bias}),
                with_kwargs=True,
            )
        )
    try:
        logits = model(ids, use_cache=False, logits_to_keep=len(token_ids) - first).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits.float().log_softmax(dim=-1)


@dataclass(frozen=True)
class EpochOfQueries:
    """Queries whose keys have the same positions.

    Attributes:
        first: position in the text of the first one.
        last: behind the last one.
        keys: [num_keys] positions in the text of what the last query before them read, and of them.
        positions: [num_keys] of these tokens for these queries.
        bias: [last - first, num_keys], minus infinity where a query does not read a key.
    """

    first: int
    last: int
    keys: torch.Tensor
    positions: torch.Tensor
    bias: torch.Tensor


def epochs_of(token_ids: Sequence[int], rule: Rule) -> list[EpochOfQueries]:
    """The queries of a text, epoch by epoch.

    Whenever the next position would be ``max_position``, what the query before reads is numbered
    anew in the order of the text.
    """
    return _epochs_of(tuple(token_ids), rule)


@lru_cache(maxsize=2)
def _epochs_of(token_ids: tuple[int, ...], rule: Rule) -> list[EpochOfQueries]:
    epochs: list[EpochOfQueries] = []
    first, kept = 0, torch.empty(0, dtype=torch.int64)
    while first < len(token_ids):
        assert len(kept) < rule.max_position, "no room for a token"
        last = min(first + rule.max_position - len(kept), len(token_ids))
        keys = torch.cat([kept, torch.arange(first, last)])
        mask = sepllm_mask(token_ids[:last], rule, first)
        assert mask.sum() == mask[:, keys].sum(), "a query reads what is no longer kept"
        bias = _bias(mask[:, keys])[0, 0]
        epochs.append(EpochOfQueries(first, last, keys, torch.arange(len(keys)), bias))
        first, kept = last, mask[-1].nonzero().ravel()
    return epochs


@contextmanager
def _attention_in_epochs(model: torch.nn.Module, epochs: list[EpochOfQueries]) -> Iterator[None]:
    """Llama's attention with keys rotated for each epoch of queries, from the projections on."""

    def forward(self: Any, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        queries, keys, values = (
            project(hidden_states)[0].unflatten(1, (-1, self.head_dim)).transpose(0, 1)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        found = []
        for epoch in epochs:
            cos, sin = model.model.rotary_emb(hidden_states, epoch.positions[None])
            key, value = (
                part.repeat_interleave(self.num_key_value_groups, 0)
                for part in (_rotated(keys[:, epoch.keys], cos, sin), values[:, epoch.keys])
            )
            # every query reads itself, so the queries are the last of the keys
            num_queries = epoch.last - epoch.first
            own = (part[:, -num_queries:] for part in (cos, sin))
            query = _rotated(queries[:, epoch.first : epoch.last], *own)
            for rows, bias in zip(query.split(BLOCK, 1), epoch.bias.split(BLOCK), strict=True):
                weights = rows @ key.transpose(1, 2) * self.scaling + bias
                found.append((weights.softmax(-1) @ value).transpose(0, 1).flatten(1))
        return self.o_proj(torch.cat(found)[None]), None

    with ExitStack() as stack:
        for attention in _attention_modules(model):
            stack.enter_context(patch.object(attention, "forward", partial(forward, attention)))
        yield


def _rotated(part: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, other = part.chunk(2, dim=-1)
    return part * cos + torch.cat([-other, one], dim=-1) * sin


def scores(path: Path, token_ids: Sequence[int], rule: Rule | None, first: int = 0) -> torch.Tensor:
    """Log-probability of each token behind the one at ``first``: [num_tokens - first - 1]."""
    every = log_probabilities(path, token_ids[:-1], rule, first)
    return every.gather(1, torch.tensor(token_ids[first + 1 :])[:, None]).squeeze(1)


def greedy(path: Path, prompt: list[int], tokens: list[int], rule: Rule | None) -> list[int]:
    """What the model would have said at the position of each of ``tokens``."""
    every = log_probabilities(path, prompt + tokens[:-1], rule, len(prompt) - 1)
    found: list[int] = every.argmax(-1).tolist()
    return found


def differences(
    path: Path, prompts: Sequence[list[int]], answers: Sequence[Answer], rule: Rule | None
) -> tuple[int, float]:
    """How many tokens the oracle would have chosen otherwise; the largest log-prob. difference."""
    num_other, largest = 0, 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = prompt + answer.token_ids
        logprobs = log_probabilities(path, tokens[:-1], rule, len(prompt) - 1)
        chosen = torch.tensor(answer.token_ids)
        num_other += int((logprobs.argmax(dim=-1) != chosen).sum())
        own = logprobs[torch.arange(len(chosen)), chosen]
        largest = max(largest, float((own - torch.tensor(answer.logprobs)).abs().max()))
    return num_other, largest


def _attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """One per layer, in order; GPT-NeoX has names of its own."""
    if model.config.model_type == "gpt_neox":
        return [layer.attention for layer in model.gpt_neox.layers]
    return [layer.self_attn for layer in model.model.layers]


def _bias(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[None, None]
