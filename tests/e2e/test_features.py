"""What vLLM does by default still works on compact caches: one engine, many kinds of request."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.engine import Engine, engine, sepllm
from tests.support.oracle import TOLERANCE, differences, rule_of, scores

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(smollm2_path: Path) -> Iterator[Engine]:
    """All layers: the text of the answers matters here."""
    with engine(
        smollm2_path,
        **sepllm(window=60, separators="extended"),
        max_num_batched_tokens=256,
        # a small model would rather go on with blanks than end its JSON
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    ) as made:
        yield made


@pytest.mark.compatibility("Prompt log-probabilities", "exact")
def test_prompt_logprobs_equal_the_oracle(
    made: Engine, smollm2_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves that every prompt position, not only the last, is attended exactly."""
    prompt = excerpt(2000, 500)
    (answer,) = made.generate([prompt], 1, prompt_logprobs=0)
    want = scores(smollm2_path, prompt, rule_of(made))
    assert answer.prompt_logprobs == pytest.approx(want.tolist(), abs=TOLERANCE)


@pytest.mark.compatibility("Several samples of a prompt, seeds", "works")
def test_several_samples_of_one_prompt(
    made: Engine, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves n > 1: samples differ, a seed repeats them, greedy ones are those of n = 1."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": excerpt(4000, 80)}
    sampled = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=24)
    first, again = (
        [c.token_ids for c in made.llm.generate([prompt], sampled)[0].outputs] for _ in range(2)
    )
    assert first == again
    assert len({tuple(t) for t in first}) == 3
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    (one,) = made.llm.generate([prompt], greedy)[0].outputs
    (answer,) = made.generate([prompt["prompt_token_ids"]], 24)
    assert list(one.token_ids) == answer.token_ids


@pytest.mark.compatibility("Seeds of prompts that are cut into chunks", "work")
def test_a_seed_does_not_depend_on_chunks(
    made: Engine, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves that a chunk draws nothing: stock vLLM's CPU engine dies of the first one."""
    from vllm import SamplingParams

    prompt = excerpt(4000, 200)
    beside = [excerpt(0, 700), excerpt(100, 700)]
    seeded = SamplingParams(temperature=1.0, seed=1, max_tokens=24, ignore_eos=True)
    (alone,) = made.llm.generate([{"prompt_token_ids": prompt}], seeded)
    answers = [a for _ in range(2) for a in made.llm.generate(_prompts([*beside, prompt]), seeded)]
    assert answers[2].outputs[0].token_ids == alone.outputs[0].token_ids
    assert answers[5].outputs[0].token_ids == alone.outputs[0].token_ids
    assert [a.outputs[0].token_ids for a in answers[:2]] == [
        a.outputs[0].token_ids for a in answers[3:5]
    ]


def _prompts(token_ids: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in token_ids]


@pytest.mark.compatibility("Stop strings, structured output", "works")
def test_stop_strings_and_structured_output(
    made: Engine, smollm2_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves both past the window, where the cache is no longer vLLM's own layout.

    The schema has few answers, so one of them must come.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    prompt = {"prompt_token_ids": excerpt(4000, 200)}
    stopped = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True, stop=["."])
    (output,) = made.llm.generate([prompt], stopped)
    assert output.outputs[0].finish_reason == "stop"
    assert "." not in output.outputs[0].text
    # what the stop string cut off is in the cache, and a following turn starts behind it
    said = prompt["prompt_token_ids"] + list(output.outputs[0].token_ids)
    following = said + excerpt(9000, 40)
    (answer,) = made.generate([following], 20)
    assert answer.num_cached_tokens >= len(said) - 1
    assert differences(smollm2_path, [following], [answer], rule_of(made))[0] == 0
    values = {"insect": ["glow-worm", "ant"], "legs": [4, 6, 8]}
    schema = {
        "type": "object",
        "properties": {name: {"enum": choices} for name, choices in values.items()},
        "required": list(values),
        "additionalProperties": False,
    }
    grammar = StructuredOutputsParams(json=schema)
    structured = SamplingParams(temperature=0.0, max_tokens=60, structured_outputs=grammar)
    (output,) = made.llm.generate([prompt], structured)
    assert output.outputs[0].finish_reason == "stop"
    found = json.loads(output.outputs[0].text)
    assert found.keys() == values.keys()
    assert all(found[name] in choices for name, choices in values.items())


@pytest.mark.compatibility("Sampling parameters", "works")
def test_sampling_parameters_reach_the_sampler(
    made: Engine, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves logit_bias, bad_words, min_tokens and penalties beside a compact cache."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": excerpt(6000, 150)}
    forced = SamplingParams(temperature=0.0, max_tokens=5, logit_bias={42: 100.0})
    assert list(made.llm.generate([prompt], forced)[0].outputs[0].token_ids) == [42] * 5
    (plain,) = made.generate([prompt["prompt_token_ids"]], 8)
    tokenizer = made.llm.get_tokenizer()
    word = tokenizer.decode(plain.token_ids[3]).strip()
    kept = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, bad_words=[word])
    tokens = list(made.llm.generate([prompt], kept)[0].outputs[0].token_ids)
    assert tokens[:3] == plain.token_ids[:3]
    assert tokens[3] != plain.token_ids[3]
    varied = SamplingParams(
        temperature=0.0, max_tokens=60, ignore_eos=True, frequency_penalty=2.0, min_tokens=60
    )
    tokens = made.llm.generate([prompt], varied)[0].outputs[0].token_ids
    assert len(tokens) == 60
    assert len(set(tokens)) > 30


@pytest.mark.compatibility("Beam search (offline)", "exact")
def test_beams_have_the_scores_of_the_oracle(
    made: Engine, smollm2_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves it by scoring every beam anew."""
    from vllm.sampling_params import BeamSearchParams

    prompt = excerpt(700, 200)
    asked = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    (output,) = made.llm.beam_search([{"prompt_token_ids": prompt}], asked)
    assert len(output.sequences) == 3
    for beam in output.sequences:
        assert len(beam.tokens) == len(prompt) + 6
        total = float(scores(smollm2_path, beam.tokens, rule_of(made), len(prompt) - 1).sum())
        assert beam.cum_logprob == pytest.approx(total, abs=TOLERANCE)


@pytest.mark.compatibility("Aborted requests", "blocks come back")
def test_aborted_requests_give_their_blocks_back(
    made: Engine, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves it in mid-prefill and in mid-decode; the engine goes on exactly."""
    prompt = excerpt(8000, 300)
    (before,) = made.generate([prompt], 20)
    for steps in (1, 2, 12):
        answers = made.generate([excerpt(0, 900), excerpt(500, 200)], 200, max_steps=steps)
        assert answers == []
        assert made.num_free_blocks == made.num_blocks
        assert not made.scheduler.requests
    (after,) = made.generate([prompt], 20)
    assert after.token_ids == before.token_ids
