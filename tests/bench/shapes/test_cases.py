"""Order, predictions and the time budget, with a clock that the test moves."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_sepllm.bench.gpus import DEVICES, GPUS
from vllm_sepllm.bench.roofline import DENSITY, POLICY, decode_cost, prefill_cost
from vllm_sepllm.bench.shapes.cases import (
    MAX_TOKENS,
    PESSIMISM,
    Budget,
    Case,
    Step,
    cases_of,
    expected_seconds,
    predicted,
    run_within,
    steps_of,
)
from vllm_sepllm.bench.shapes.measure import work_of
from vllm_sepllm.bench.shapes.shape import SEPARATORS, SHAPES, text

H100 = GPUS["h100"]
LLAMA = SHAPES["llama-3-8b"].sizes
LONGEST = 131072
TTFT, DECODE = Case("ttft", 8192, 1), Case("decode", 8192, 16)


def test_cases_fill_a_cache_that_holds_the_longest_prompt_once() -> None:
    found = cases_of([131072, 8192, 32768], ["ttft", "decode", "concurrency"])
    assert [(case.suite, case.length, case.batch) for case in found] == [
        ("ttft", 8192, 1),
        ("decode", 8192, 1),
        ("decode", 8192, 16),
        ("concurrency", 8192, 32),
        ("ttft", 32768, 1),
        ("decode", 32768, 1),
        ("decode", 32768, 4),
        ("concurrency", 32768, 8),
        ("ttft", 131072, 1),
        ("decode", 131072, 1),
        ("concurrency", 131072, 3),
    ]
    assert cases_of([8192], ["ttft"]) == [TTFT]
    for case in found:
        work = work_of(case, 1024, 0, LONGEST)
        # decoding is timed where stock vLLM's requests fit; concurrency where they do not
        assert work.holds_in_full(case.length, case.batch) is (case.suite != "concurrency")


def test_every_case_comes_once_before_any_comes_again() -> None:
    steps = list(steps_of([TTFT, DECODE], 2))
    assert steps == [Step(TTFT, 0), Step(DECODE, 0), Step(TTFT, 1), Step(DECODE, 1)]


class Clock:
    """Seconds that pass only where the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_steps_stop_when_the_time_is_over() -> None:
    clock, taken = Clock(), {TTFT: 2.0, DECODE: 5.0}
    budget, done = Budget(16.0, clock), dict[Step, float]()

    def run(step: Step) -> float:
        clock.now += taken[step.case]
        return taken[step.case]

    left_out = run_within(steps_of([TTFT, DECODE], 3), done, lambda case: 1.0, budget, run)
    # 2 + 5 + 2 + 5 seconds, and 2 are left: not more than the next needs
    assert list(done) == [Step(TTFT, 0), Step(DECODE, 0), Step(TTFT, 1), Step(DECODE, 1)]
    assert left_out == [
        (Step(TTFT, 2), "needs about 2 s, 2 s were left"),
        (Step(DECODE, 2), "needs about 5 s, 2 s were left"),
    ]
    assert budget.left() == 2.0
    # started again, it goes on with what is missing
    again: list[Step] = []
    run_within(
        steps_of([TTFT, DECODE], 3), done, lambda case: 1.0, Budget(60.0, clock),
        lambda step: again.append(step) or 1.0,  # type: ignore[func-returns-value]
    )  # fmt: skip
    assert again == [Step(TTFT, 2), Step(DECODE, 2)]


def test_a_long_case_is_left_out_by_its_guess_and_a_short_one_behind_it_runs() -> None:
    done = dict[Step, float]()
    guess = {DECODE: 50.0, TTFT: 1.0}.__getitem__
    steps = steps_of([DECODE, TTFT], 1)
    left_out = run_within(steps, done, guess, Budget(10.0, Clock()), lambda step: 1.0)
    assert list(done) == [Step(TTFT, 0)]
    assert [step for step, _ in left_out] == [Step(DECODE, 0)]


def test_a_budget_is_never_negative() -> None:
    clock = Clock()
    budget = Budget(1.0, clock)
    clock.now += 5
    assert budget.left() == 0.0


def test_predictions_are_the_rooflines() -> None:
    first = prefill_cost(LLAMA, H100, 1, 8192, POLICY, DENSITY).bound_ms / 1e3
    assert predicted(TTFT, "sepllm", LLAMA, H100, LONGEST) == first
    step = decode_cost(LLAMA, H100, 1, 8192 + MAX_TOKENS // 2, 16, None, DENSITY)
    assert predicted(DECODE, "stock", LLAMA, H100, LONGEST) == step.bound_ms / 1e3
    # 4 + 508 and the latest 256 of the 5 % of the other 7680
    compact = decode_cost(LLAMA, H100, 1, 768, 16, None, DENSITY)
    side = "stock at the compact length"
    assert predicted(DECODE, side, LLAMA, H100, LONGEST) == compact.bound_ms / 1e3
    assert predicted(DECODE, "streaming-llm", LLAMA, H100, LONGEST) is None


def test_concurrency_is_predicted_in_turns_of_what_fits() -> None:
    """Of 128K one request fits in full, so stock vLLM takes three turns, and sepllm one."""
    case = Case("concurrency", 131072, 3)
    context = 131072 + MAX_TOKENS // 2
    for side, policy, turns in (("stock", None, 3), ("sepllm", POLICY, 1)):
        first = prefill_cost(LLAMA, H100, 1, 131072, policy, DENSITY).bound_ms / 1e3
        at_once = 3 // turns
        step = decode_cost(LLAMA, H100, 1, context, at_once, policy, DENSITY).bound_ms / 1e3
        seconds = 3 * first + turns * MAX_TOKENS * step
        found = predicted(case, side, LLAMA, H100, LONGEST)
        assert found == pytest.approx(3 * MAX_TOKENS / seconds)


def test_guesses_are_pessimistic_and_need_a_known_gpu() -> None:
    bounds = [predicted(TTFT, side, LLAMA, H100, LONGEST) for side in ("stock", "sepllm")]
    guess = expected_seconds(TTFT, LLAMA, H100, LONGEST)
    assert guess == pytest.approx(PESSIMISM * sum(b for b in bounds if b is not None))
    assert expected_seconds(TTFT, LLAMA, None, LONGEST) == 0.0
    prompts = expected_seconds(Case("decode", 8192, 16), LLAMA, H100, LONGEST)
    assert prompts > 16 * guess


def test_first_rounds_of_both_shapes_fit_ten_minutes_at_half_the_peak() -> None:
    """By the cost model alone: twice its bounds, and a minute for the engines of each shape."""
    cases = cases_of([8192, 32768, 131072], ["ttft", "decode", "concurrency"])
    total = 0.0
    for name in ("llama-3-8b", "qwen3-8b"):
        sizes = SHAPES[name].sizes
        bounds = [expected_seconds(case, sizes, H100, LONGEST) / PESSIMISM for case in cases]
        total += 60 + 2 * sum(bounds)
    assert total < 600


def test_requests_of_a_case_are_new_in_every_round_unless_they_decode() -> None:
    case = Case("ttft", 100, 1)
    first, second = (work_of(case, 512, number, 200).prompt(0, 100) for number in (0, 1))
    assert first != second
    decode = Case("decode", 100, 2)
    first, second = (work_of(decode, 512, number, 200).prompt(0, 100) for number in (0, 1))
    assert first == second


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_what_transformers_reads(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = SHAPES[name]
    config: Any = transformers.AutoConfig.from_pretrained(shape.write(tmp_path, 131072))
    sizes = shape.sizes
    assert config.num_hidden_layers == sizes.num_layers
    assert config.head_dim * config.num_key_value_heads * 4 * sizes.num_layers == sizes.kv_bytes
    assert config.max_position_embeddings > 131072 + MAX_TOKENS
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == config.architectures


def test_sizes_of_the_models_are_those_published() -> None:
    """8.03 and 8.19 billion weights; 128 and 144 KiB of KV a token."""
    found = [SHAPES[name].sizes for name in ("llama-3-8b", "qwen3-8b")]
    totals = [sizes.layer_weights + 2 * sizes.head_weights for sizes in found]
    assert totals == pytest.approx([8.03e9, 8.19e9], rel=1e-3)
    assert [sizes.kv_bytes for sizes in found] == [128 << 10, 144 << 10]


def test_text_has_as_many_separators_as_english() -> None:
    ids = text(1024, 20_000, 3)
    share = sum(token in SEPARATORS for token in ids) / len(ids)
    assert share == pytest.approx(DENSITY, abs=0.01)
    assert max(ids) < 1024
    assert ids == text(1024, 20_000, 3) != text(1024, 20_000, 4)


def test_every_known_device_has_figures() -> None:
    assert set(DEVICES.values()) == set(GPUS)
