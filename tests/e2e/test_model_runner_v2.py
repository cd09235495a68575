"""The GPU path end to end in Triton's interpreter: exact, whoever runs the model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.interpreted_engine import Engines, Report
from tests.support.oracle import TOLERANCE, Rule, epochs_of, log_probabilities
from tests.support.tiny_models import SEPARATORS, random_prompts

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

POLICY = {"initial_tokens": 3, "window": 29, "separators": [*SEPARATORS, 17, 19, 23, 29, 31]}
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    made.close()


def rule(**policy: Any) -> Rule:
    merged = POLICY | policy
    return Rule(
        initial_tokens=merged["initial_tokens"],
        window=merged["window"],
        separator_ids=frozenset(merged["separators"]),
        max_separators=merged.get("max_separators"),
        max_position=merged.get("max_position"),
        full_layers=frozenset(merged.get("full_layers", ())),
    )


def without(token: int, prompts: list[list[int]]) -> list[list[int]]:
    """The prompts with another token in the place of ``token``."""
    return [[token + 1 if i == token else i for i in prompt] for prompt in prompts]


def continuation(path: Path, prompt: list[int], wanted: Rule) -> list[int]:
    """The oracle's greedy answer."""
    tokens: list[int] = []
    for _ in range(MAX_TOKENS):
        tokens.append(int(log_probabilities(path, prompt + tokens, wanted)[-1].argmax()))
    return tokens


def check(
    path: Path,
    rounds: list[list[list[int]]],
    report: Report,
    wanted: Rule,
    initial_tokens: list[list[int]] | None = None,
) -> None:
    """Every token and log-probability is the oracle's, and full attention's are others.

    ``initial_tokens`` are those of each prompt; None: the rule's.
    """
    num_unlike_full = 0
    for number, (asked, answered) in enumerate(zip(rounds, report.rounds, strict=True)):
        answers = zip(asked, answered.tokens, answered.logprobs, strict=True)
        for place, (prompt, tokens, logprobs) in enumerate(answers):
            assert len(tokens) == MAX_TOKENS
            chosen, own_rule = torch.tensor(tokens), wanted
            if initial_tokens is not None:
                own_rule = replace(wanted, initial_tokens=initial_tokens[number][place])
            for reference in (own_rule, None):
                every = log_probabilities(path, (prompt + tokens)[:-1], reference)
                every = every[len(prompt) - 1 :]
                if reference is None:
                    num_unlike_full += int((every.argmax(dim=-1) != chosen).sum())
                    continue
                own = every[torch.arange(len(chosen)), chosen]
                assert every.argmax(dim=-1).tolist() == tokens
                assert float((own - torch.tensor(logprobs)).abs().max()) < TOLERANCE
    assert num_unlike_full > 0


def arguments(model: Path, policy: dict[str, Any], **llm: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "attention_backend": "sepllm",
        "additional_config": {"sepllm": POLICY | policy},
        "max_num_batched_tokens": 96,
        **llm,
    }


@pytest.mark.compatibility("Model Runner V2 and the GPU kernels, in Triton's interpreter", "exact")
def test_v2_is_exact_and_reuses_prefixes(engines: Engines, tiny_llama_path: Path) -> None:
    """Proves builder, kernels and checkpoints under Model Runner V2, with a tail that wraps.

    Chunks of 96 tokens of up to three requests at once; the second round continues the first, the
    third has other initial tokens, one of them a protected prefix that ends with the token 2.
    """
    end = 2
    policy = {"max_separators": 5, "checkpoint_interval": 64, "protect": end, "max_protected": 150}
    first = without(end, random_prompts(200, 17, 90, 131))
    more = without(end, random_prompts(40, 40, 40, 40))
    second = [prompt + extra for prompt, extra in zip(first, more, strict=True)]
    third = [first[0], first[2], [*first[3][:70], end, *first[3]]]
    rounds = [first, second, third]
    chosen = [{"sepllm_initial_tokens": 150}, {"sepllm_initial_tokens": 0}, None]
    choices = [[None] * 4, [None] * 4, chosen]
    report = engines.run(
        rounds, MAX_TOKENS, llm=arguments(tiny_llama_path, policy), choices=choices
    )
    assert report.classes == {
        "scheduler": "SepLLMScheduler",
        "runner": "vllm.v1.worker.cpu.model_runner",
        "impl": "SepLLMGPUImpl",
        "backend": "SepLLMTritonAttentionBackend",
    }
    initial_tokens = [[3] * 4, [3] * 4, [150, 0, 71]]
    check(tiny_llama_path, rounds, report, rule(max_separators=5), initial_tokens)
    assert sum(report.rounds[1].num_cached_tokens) > 200


@pytest.mark.compatibility("Asynchronous scheduling, in Triton's interpreter", "exact")
def test_v2_with_asynchronous_scheduling_and_preemption(
    engines: Engines, tiny_llama_path: Path
) -> None:
    """Proves that the plan needs settled tokens alone, that nothing is lost in a tiny pool, and
    that a turn starts from the state that the turn before left with a step in flight.

    The pool holds the prompts; the short ones need a second block when their windows are full.
    """
    policy = {"max_separators": 60}
    first = random_prompts(150, 25, 26, 24, 22, 27)
    turn = first[0][:120]
    answer = continuation(tiny_llama_path, turn, rule(**policy))
    rounds = [first, [turn], [turn + answer + first[1]]]
    llm = arguments(tiny_llama_path, policy, num_gpu_blocks_override=8)
    report = engines.run(rounds, MAX_TOKENS, llm=llm, asynchronous=True)
    assert report.classes["scheduler"] == "SepLLMAsyncScheduler"
    assert report.num_preemptions > 0
    assert report.rounds[2].num_cached_tokens[0] > len(turn)
    check(tiny_llama_path, rounds, report, rule(max_separators=60))


@pytest.mark.compatibility(
    'Requests beyond the trained length (`positions: "renumbered"`) under Model Runner V2, in '
    "Triton's interpreter",
    "exact",
)
def test_v2_renumbers_positions(engines: Engines, tiny_llama_path: Path) -> None:
    """Proves that keys turn and positions shift over four epochs, in chunks beside decodes and
    with asynchronous scheduling; that answers cross a boundary; that a prefix hit in a later epoch
    and preemption do not show; and that positions of the text would be noticed.
    """
    policy = {
        "positions": "renumbered",
        "max_position": 128,
        "max_separators": 12,
        "checkpoint_interval": 64,
    }
    # the pool holds the prompts; when the windows of the short ones are full, the last must leave
    first = random_prompts(25, 26, 120, 24, 400)
    long = first[-1]
    rounds = [first, [long[:390] + first[2][:40]]]
    llm = arguments(tiny_llama_path, policy, max_model_len=100_000, num_gpu_blocks_override=8)
    report = engines.run(rounds, MAX_TOKENS, llm=llm, asynchronous=True)
    wanted = rule(**policy)
    tokens = report.rounds[0].tokens
    texts = [prompt + answer for prompt, answer in zip(first, tokens, strict=True)]
    assert [len(epochs_of(text, wanted)) for text in texts] == [1, 1, 2, 1, 5]
    assert report.num_preemptions > 0
    assert report.rounds[1].num_cached_tokens[0] > 128
    check(tiny_llama_path, rounds, report, wanted)
    of_text = log_probabilities(tiny_llama_path, texts[-1][:-1], rule(max_separators=12))
    assert of_text[len(long) - 1 :].argmax(-1).tolist() != tokens[-1]


@pytest.mark.compatibility("Model Runner V1 with the GPU kernels, in Triton's interpreter", "exact")
def test_v1_runs_the_same_builder_and_layers(engines: Engines, tiny_llama_path: Path) -> None:
    """Proves the GPU path under Model Runner V1, with a layer that keeps full attention and a
    request with initial tokens of its own."""
    rounds = [random_prompts(200, 17, 131)]
    policy, choices = {"full_layers": [0]}, [[None, None, {"sepllm_initial_tokens": 70}]]
    llm = arguments(tiny_llama_path, policy)
    report = engines.run(rounds, MAX_TOKENS, llm=llm, runner="v1", choices=choices)
    assert report.classes["runner"] == "vllm.v1.worker.cpu_model_runner"
    wanted = rule(max_separators=256, full_layers=[0])
    check(tiny_llama_path, rounds, report, wanted, [[3, 3, 70]])


@pytest.mark.compatibility("Speculative decoding, ngram, in Triton's interpreter", "exact")
def test_ngram_drafts_change_nothing(engines: Engines, tiny_llama_path: Path) -> None:
    """Proves staging and commits: drafts that are right, wrong, and at the window's start; with
    initial tokens per request."""
    # what repeats is drafted, and the answers of so small a model repeat soon
    rounds = [[prompt + prompt[-40:] for prompt in random_prompts(150, 17, 24)]]
    llm = arguments(
        tiny_llama_path,
        {"max_separators": 9},
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        },
    )
    choices = [[{"sepllm_initial_tokens": 60}, None, None]]
    report = engines.run(rounds, MAX_TOKENS, llm=llm, choices=choices)
    assert report.num_accepted > 0
    check(tiny_llama_path, rounds, report, rule(max_separators=9), [[60, 3, 3]])


@pytest.mark.compatibility("Speculative decoding, draft model, in Triton's interpreter", "exact")
def test_a_draft_model_changes_nothing(engines: Engines, tiny_llama_path: Path) -> None:
    """Proves the same with drafts of a model of its own, whose layers stay vLLM's.

    It drafts for itself with full attention: right as long as the window makes no difference.
    """
    rounds = [random_prompts(150, 17, 24)]
    llm = arguments(
        tiny_llama_path,
        {},
        speculative_config={
            "method": "draft_model",
            "model": str(tiny_llama_path),
            "num_speculative_tokens": 3,
        },
    )
    report = engines.run(rounds, MAX_TOKENS, llm=llm)
    assert report.num_accepted > 0
    check(tiny_llama_path, rounds, report, rule(max_separators=256))
