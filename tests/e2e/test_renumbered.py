"""Renumbered positions in real vLLM, against keys that are rotated for each epoch of queries."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.support import oracle
from tests.support.compatibility import exact
from tests.support.engine import Answer, Engine, Watch, engine
from tests.support.measured import Number
from tests.support.oracle import TOLERANCE, differences, epochs_of, rule_of
from tests.support.tiny_engine import tiny_sepllm
from tests.support.tiny_models import SEPARATORS, tiny_text

pytestmark = pytest.mark.slow

LENGTH, WINDOW, NUM_SEPARATORS = 400, 60, 32
RENUMBERED: dict[str, Any] = {
    "positions": "renumbered",
    "max_position": LENGTH,
    "window": WINDOW,
    "max_separators": NUM_SEPARATORS,
}
# far beyond the 4,096 positions of the tiny Llama
ENGINE: dict[str, Any] = {"max_model_len": 1_000_000, "max_num_seqs": 8}


@dataclass(frozen=True)
class Case:
    """A policy, how prompts are cut, and their lengths; the last has six epochs at least."""

    name: str
    policy: dict[str, Any]
    chunk: int
    lengths: tuple[int, ...] = (700, 57, LENGTH - 10, 2000)
    engine: dict[str, Any] = field(default_factory=dict)
    feature: str | None = None


CASES = [
    Case(
        "window 60, 32 separators, chunks of 128",
        {},
        128,
        feature='Requests beyond the trained length (`positions: "renumbered"`)',
    ),
    Case("window 252, chunks of 512", {"window": 252}, 512, (400, 1100)),
    Case(
        "256 separators, positions below 1024",
        {"window": 252, "max_separators": 256, "max_position": 1024},
        512,
        (1300, 3800),
    ),
    Case(
        "positions below 2048, chunks of 2048",
        {"window": 252, "max_separators": 256, "max_position": 2048},
        2048,
        (9800,),
    ),
    Case("no initial tokens, chunks of 100", {"initial_tokens": 0}, 100),
    Case("blocks of 128", {}, 512, engine={"block_size": 128}),
    Case("compiled", {}, 128, (57, 2000), engine={"enforce_eager": False}),
]
PRESETS = [
    Case("streaming-llm", {"preset": "streaming-llm", "max_separators": None}, 128),
    Case("every 7th token", {"preset": "fixed-interval", "interval": 7}, 128),
]


def check(made: Engine, path: Path, prompts: list[list[int]], num_tokens: int = 48) -> Any:
    """Answers, which are the oracle's."""
    answers = made.generate(prompts, num_tokens)
    num_other, largest = differences(path, prompts, answers, rule_of(made))
    assert num_other == 0
    assert largest < TOLERANCE
    return answers


@pytest.mark.parametrize("case", [*map(exact, CASES + PRESETS)])
def test_engine_equals_keys_rotated_for_each_epoch(
    case: Case, tiny_llama_path: Path, number: Number, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves it over six epochs, and that positions of the text would be noticed."""
    policy = {
        name: value for name, value in (RENUMBERED | case.policy).items() if value is not None
    }
    if "preset" not in policy:
        policy["separators"] = SEPARATORS
    prompts = [tiny_text(4000 * i, length) for i, length in enumerate(case.lengths)]
    arguments: dict[str, Any] = tiny_sepllm() | ENGINE | case.engine
    arguments |= {"additional_config": {"sepllm": policy}, "max_num_batched_tokens": case.chunk}
    with engine(tiny_llama_path, **arguments) as made:
        rule = rule_of(made)
        answers = made.generate(prompts, 48)
    num_other, largest = differences(tiny_llama_path, prompts, answers, rule)
    number("differences", f"{num_other} of {48 * len(prompts)}, log-probabilities {largest:.1e}")
    assert num_other == 0
    assert largest < TOLERANCE
    epochs = epochs_of(prompts[-1] + answers[-1].token_ids[:-1], rule)
    assert sum(epoch.first < len(prompts[-1]) for epoch in epochs) >= 6
    of_text = [replace(epoch, positions=epoch.keys) for epoch in epochs]
    monkeypatch.setattr(oracle, "epochs_of", lambda *_: of_text)
    _, largest = differences(tiny_llama_path, prompts[-1:], answers[-1:], rule)
    assert largest > 100 * TOLERANCE


def test_a_trained_model_equals_keys_rotated_for_each_epoch(
    four_layers_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves it with real weights, heads of 64 and the model's own separators."""
    policy = {**RENUMBERED, "separators": "extended", "max_position": 600, "window": 124}
    with engine(
        four_layers_path,
        attention_backend="sepllm",
        additional_config={"sepllm": policy},
        max_num_batched_tokens=256,
        **ENGINE,
    ) as made:
        prompts = [excerpt(0, 2800), excerpt(7000, 590)]
        assert len(epochs_of(prompts[0], rule_of(made))) >= 6
        check(made, four_layers_path, prompts)


@pytest.fixture(scope="module")
def made(tiny_llama_path: Path) -> Iterator[Engine]:
    with engine(
        tiny_llama_path,
        **tiny_sepllm(**RENUMBERED, checkpoint_interval=128),
        **ENGINE,
        max_num_batched_tokens=128,
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> None:
    if "made" in request.fixturenames:
        assert request.getfixturevalue("made").llm.reset_prefix_cache()


def starts(text: list[int], made: Engine) -> list[int]:
    """Where the epochs of a text begin."""
    return [epoch.first for epoch in epochs_of(text, rule_of(made))]


def test_prefixes_part_on_both_sides_of_a_boundary(made: Engine, tiny_llama_path: Path) -> None:
    """Proves that a checkpoint belongs to an epoch, and that turned keys harm none."""
    whole = tiny_text(0, 1500)
    edges = starts(whole, made)[1:4:2]
    cuts = [
        whole[: edge + i] + tiny_text(5000 + edge + i, 40) for edge in edges for i in (-1, 0, 1)
    ]
    reused = 0
    for prompts in ([whole, *cuts], [*cuts, whole]):
        for prompt in prompts:
            (answer,) = check(made, tiny_llama_path, [prompt], 4)
            reused += answer.num_cached_tokens
    assert reused > 6000


def test_a_state_that_ends_at_a_boundary_is_turned_by_whoever_goes_on(
    made: Engine, tiny_llama_path: Path
) -> None:
    """Proves it for requests whose last computed token is the epoch's, one before and behind."""
    text = tiny_text(2000, 1000)
    edge = starts(text, made)[2]
    for i in (-1, 0, 1):
        # of its tokens all but the last sampled one are computed
        (first,) = check(made, tiny_llama_path, [text[: edge + i]], 1)
        following = text[: edge + i] + first.token_ids + text[edge + i + 1 : edge + 60]
        (again,) = check(made, tiny_llama_path, [following], 4)
        assert again.num_cached_tokens >= edge + i - 128


def test_preemption_inside_of_epochs_does_not_show(made: Engine, tiny_llama_path: Path) -> None:
    """Proves it in mid-prefill and in mid-decode; each goes on from the state that it left."""
    prompts = [tiny_text(1500 * i, 300 + 170 * i) for i in range(4)]
    scheduler, watch = made.scheduler, Watch()
    schedule, num_steps = scheduler.schedule, 0

    def preempting(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps % 29 == 3:
            for request in reversed(scheduler.running):
                scheduler._begin_anew(request)
        return schedule(*args, **kwargs)

    with patch.object(scheduler, "schedule", preempting):
        answers = made.generate(prompts, 200, watch=watch)
    num_other, largest = differences(tiny_llama_path, prompts, answers, rule_of(made))
    assert watch.num_preemptions > 10
    assert num_other == 0
    assert largest < TOLERANCE
    most = -(-(4 + WINDOW + NUM_SEPARATORS) // 32)
    assert max(held for _, (held,) in watch.holdings) == most, "a + n + s, however long"


def test_requests_with_windows_of_their_own(made: Engine, tiny_llama_path: Path) -> None:
    """Proves that each has its own epochs, and that one without room for any is refused."""
    prompt, rule = tiny_text(100, 1200), rule_of(made)
    windows = {28: {"sepllm_window": 28}, 300: {"sepllm_window": 300}, WINDOW: None}
    answers = made.generate([prompt] * 3, 24, choices=list(windows.values()))
    for window, answer in zip(windows, answers, strict=True):
        own = replace(rule, window=window)
        num_other, largest = differences(tiny_llama_path, [prompt], [answer], own)
        assert num_other == 0
        assert largest < TOLERANCE
    for choice in ({"sepllm_window": 301}, {"sepllm": False}):
        with pytest.raises(
            ValueError, match="tokens, max_tokens included, has positions below 400"
        ):
            made.generate([prompt], 4, choices=[choice])
    # as long as it never renumbers, it may keep everything
    short = prompt[: LENGTH - 4]
    (answer,) = made.generate([short], 4, choices=[{"sepllm": False}])
    num_other, largest = differences(tiny_llama_path, [short], [answer], None)
    assert num_other == 0
    assert largest < TOLERANCE


def test_several_answers_to_a_prompt(made: Engine, tiny_llama_path: Path) -> None:
    """Proves that they start from one prompt beyond a boundary and cross others apart."""
    from vllm import SamplingParams

    prompt = tiny_text(3000, 600)
    parameters = SamplingParams(n=3, temperature=1.0, max_tokens=150, ignore_eos=True, logprobs=0)
    (output,) = made.llm.generate([{"prompt_token_ids": prompt}], parameters)
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    for one in output.outputs:
        logprobs = [
            at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)
        ]
        answer = Answer(list(one.token_ids), logprobs)
        _, largest = differences(tiny_llama_path, [prompt], [answer], rule_of(made))
        assert largest < TOLERANCE


def test_below_max_position_nothing_differs_by_a_bit(made: Engine, tiny_llama_path: Path) -> None:
    """Proves it beside an engine with the positions of the text, which ends the other one."""
    prompts = [tiny_text(900 * i, length) for i, length in enumerate((57, 200, LENGTH - 20))]
    answers = made.generate(prompts, 20)
    text = {"window": WINDOW, "max_separators": NUM_SEPARATORS, "checkpoint_interval": 128}
    with engine(tiny_llama_path, **tiny_sepllm(**text), max_num_batched_tokens=128) as stock:
        assert answers == stock.generate(prompts, 20)
