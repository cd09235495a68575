"""Prompts that come back find what they have in common, as in stock vLLM; no model, real pools."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import BlockHash

from tests.support.schedulers import Run, Setting, random_tokens, write_model
from vllm_sepllm.integration.scheduler.prefix_cache.branch_points import BranchPoints

KINDS = ("stock", "sync", "async")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"))


def reused(run: Run, prompts: list[list[int]], max_tokens: int = 8) -> int:
    """Tokens that a batch of prompts found in the cache."""
    names = [run.arrive(prompt, max_tokens) for prompt in prompts]
    run.finish()
    return sum(run.num_reused[name] for name in names)


def alike(pick: random.Random, number: int, common: int, own: int) -> list[list[int]]:
    """Prompts with so many tokens in common, and so many of their own."""
    shared = random_tokens(pick, common)
    return [[*shared, *random_tokens(pick, own)] for _ in range(number)]


def test_a_batch_that_comes_back_after_a_reset_reuses_what_stock_vllm_reuses(model: Path) -> None:
    """32 prompts with 960 tokens in common, five times; in a small pool once with other traffic."""
    prompts = alike(random.Random(0), 32, 960, 106)
    other = alike(random.Random(1), 20, 0, 1500)
    found = {}
    for kind in KINDS:
        setting = Setting(model, kind, 360, max_num_batched_tokens=2048, max_num_seqs=8, policy=())
        run = Run(setting)
        batches = []
        for number in range(5):
            if number == 3:  # evicts all of it
                reused(run, other)
            else:
                assert run.scheduler.reset_prefix_cache()
            batches.append(reused(run, prompts))
        found[kind] = batches
    print(found)
    for kind in ("sync", "async"):
        for ours, stock in zip(found[kind], found["stock"], strict=True):
            assert stock >= 31 * 960
            assert ours >= 0.95 * stock


def test_three_levels_are_found_again(model: Path) -> None:
    """A system prompt, few-shot examples of two tasks, three documents each, four questions."""
    pick = random.Random(3)
    system = random_tokens(pick, 700)
    prompts = []
    for _ in range(2):
        task = random_tokens(pick, 640)
        for _ in range(3):
            document = random_tokens(pick, 900)
            for _ in range(4):
                prompts.append([*system, *task, *document, *random_tokens(pick, 50)])
    pick.shuffle(prompts)
    found = {}
    for kind in KINDS:
        run = Run(Setting(model, kind, 2000, max_num_batched_tokens=2048, policy=()))
        found[kind] = []
        for _ in range(3):
            assert run.scheduler.reset_prefix_cache()
            found[kind].append(reused(run, prompts))
    print(found)
    # in the first batch nobody knows yet where the prompts part
    for kind in ("sync", "async"):
        assert all(
            ours >= share * stock
            for share, ours, stock in zip(
                (0.8, 0.95, 0.95), found[kind], found["stock"], strict=True
            )
        )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(1, 4),
    num_children=st.integers(2, 4),
    kind=st.sampled_from(["sync", "async"]),
    num_rounds=st.integers(2, 4),
    at_once=st.sampled_from([1, 3, 100]),
)
def test_random_trees_of_prompts(
    model: Path, seed: int, depth: int, num_children: int, kind: str, num_rounds: int, at_once: int
) -> None:
    """Once prompts were seen, at least 85 % of stock vLLM's reuse, whatever the order and however
    often they come back, with resets in between or without."""
    pick = random.Random(seed)

    def grow(prefix: list[int], level: int) -> list[list[int]]:
        prefix = [*prefix, *random_tokens(pick, pick.randrange(40, 400))]
        if level == depth:
            return [[*prefix, *random_tokens(pick, pick.randrange(1, 70))]]
        branches = [grow(prefix, level + 1) for _ in range(num_children)]
        return [prompt for branch in branches for prompt in branch]

    prompts = pick.sample(leaves := grow([], 0), min(40, len(leaves)))
    orders = [pick.sample(prompts, len(prompts)) for _ in range(num_rounds)]
    resets = [pick.random() < 0.7 for _ in range(num_rounds)]
    found = {}
    for each in ("stock", kind):
        run = Run(Setting(model, each, 4000, max_num_batched_tokens=512), seed)
        found[each] = []
        for order, resets_cache in zip(orders, resets, strict=True):
            if resets_cache:
                assert run.scheduler.reset_prefix_cache()
            batches = [order[i : i + at_once] for i in range(0, len(order), at_once)]
            found[each].append(sum(reused(run, batch) for batch in batches))
    later = [sum(found[each][1:]) for each in ("stock", kind)]
    assert later[1] >= 0.85 * later[0], found


def test_equal_prompts_of_one_step_are_computed_once(model: Path) -> None:
    """As in stock vLLM; the second one starts a step later, from what the first one leaves."""
    for length in (40, 200, 700):
        prompt = random_tokens(random.Random(length), length)
        found = {}
        for kind in KINDS:
            run = Run(Setting(model, kind, max_num_batched_tokens=2048))
            found[kind] = reused(run, [prompt, prompt, prompt])
        assert found["sync"] == found["async"] == found["stock"] == 2 * ((length - 1) // 32 * 32)


def test_nobody_waits_for_a_beginning_that_is_hardly_worth_a_step(model: Path) -> None:
    """Prompts of 500 tokens with a block in common start in one step."""
    run = Run(Setting(model, max_num_batched_tokens=2048, policy=()))
    for prompt in alike(random.Random(5), 4, 32, 468):
        run.arrive(prompt, 8)
    run.step()
    assert len(run.scheduler.running) == 4


def test_a_request_goes_on_if_the_one_that_it_waits_for_is_aborted(model: Path) -> None:
    setting = Setting(model, max_num_batched_tokens=128)
    run = Run(setting)
    for prompt in alike(random.Random(6), 2, 600, 30):
        run.arrive(prompt, 8)
    for _ in range(2):
        run.step()
        assert [r.request_id for r in run.scheduler.running] == ["request-1"]
    run.scheduler.finish_requests("request-1", run.scheduler.running[0].status.FINISHED_ABORTED)
    run.step()
    assert [r.request_id for r in run.scheduler.running] == ["request-2"]
    run.finish()


def hashes(text: str) -> list[BlockHash]:
    """A hash a letter, of all letters up to there."""
    return [BlockHash(text[: i + 1].encode()) for i in range(len(text))]


def parts(points: BranchPoints, text: str) -> list[int]:
    return list(points.between(hashes(text), 0, len(text)))


def test_branch_points_are_where_texts_were_seen_to_part() -> None:
    points = BranchPoints()
    points.see(hashes("abcdef"))
    assert parts(points, "abcdef") == []
    points.see(hashes("abcdef"))
    points.see(hashes("abc"))
    points.see(hashes("abcdefgh"))  # one goes on where another ended
    assert parts(points, "abcdefgh") == []
    points.see(hashes("abcx"))
    points.see(hashes("abcdefgy"))
    for _ in range(3):
        points.see(hashes("abcdefgh"))
        assert parts(points, "abcdefgh") == [3, 7]
        assert list(points.between(hashes("abcdefgh"), 3, 6)) == []


def test_hashes_that_were_not_seen_for_long_are_forgotten() -> None:
    points = BranchPoints(max_hashes=8)
    points.see(hashes("abcd"))
    points.see(hashes("abx"))
    assert parts(points, "abcd") == [2]
    points.see(hashes("pqrstuvw"))
    assert parts(points, "abcd") == []
    assert len(points._next) == 8


def test_a_large_pool_is_no_condition(model: Path) -> None:
    """12 prompts with 960 tokens in common and other traffic in between: three rounds in a pool
    that does not hold both."""
    prompts = alike(random.Random(7), 12, 960, 60)
    found = {}
    for kind in KINDS:
        setting = Setting(model, kind, 260, max_num_batched_tokens=2048, policy=())
        run = Run(replace(setting, max_num_seqs=4))
        found[kind] = []
        for number in range(3):
            found[kind].append(reused(run, prompts))
            reused(run, alike(random.Random(number), 12, 0, 1400))
    print(found)
    for kind in ("sync", "async"):
        assert all(
            ours >= 0.95 * stock for ours, stock in zip(found[kind], found["stock"], strict=True)
        )


# ends a system prompt; random_tokens and Run sample none
END = 100
PROTECTING = (("protect", END), ("max_protected", 2048), ("window", 252))


@pytest.mark.parametrize("num_protected", [40, 1000, 2048])
def test_chats_with_one_system_prompt_share_it_at_block_granularity(
    model: Path, num_protected: int
) -> None:
    """Whatever follows it, and wherever in it they part: as much as in stock vLLM."""
    pick = random.Random(num_protected)
    system = [*random_tokens(pick, num_protected - 1), END]
    first = [*system, *random_tokens(pick, 1500)]
    others = [[*system, *random_tokens(pick, length)] for length in (1, 300, 1500)]
    # a system prompt of the same length that is another from some token on
    cut = num_protected * 2 // 3
    parted = [*system[:cut], *random_tokens(pick, num_protected - cut - 1), END]
    others.append([*parted, *random_tokens(pick, 500)])
    found = {}
    for kind in KINDS:
        run = Run(Setting(model, kind, 2000, max_num_batched_tokens=512, policy=PROTECTING))
        assert reused(run, [first]) == 0
        found[kind] = [reused(run, [prompt]) for prompt in others]
    assert found["sync"] == found["async"] == found["stock"]
    assert found["stock"] == [
        *[(num_protected - (num_protected % 32)) for _ in range(3)],
        cut // 32 * 32,
    ]


def test_a_long_chat_reuses_what_stock_vllm_reuses(model: Path) -> None:
    """A system prompt of 1000 tokens and 20 turns, each with an answer of the engine in it."""
    found, lengths = {}, {}
    for kind in KINDS:
        run = Run(Setting(model, kind, 2000, max_num_batched_tokens=512, policy=PROTECTING))
        pick = random.Random(9)
        chat = [*random_tokens(pick, 999), END]
        found[kind] = []
        for _ in range(20):
            chat += [*random_tokens(pick, pick.randrange(20, 120)), END]
            name = run.arrive(chat, pick.randrange(20, 200))
            request = run.scheduler.requests[name]
            run.finish()
            found[kind].append(run.num_reused[name])
            chat = [*request.all_token_ids, END]
        lengths[kind] = len(chat)
    print(found)
    assert lengths["sync"] == lengths["async"] == lengths["stock"] > 3000
    for kind in ("sync", "async"):
        assert sum(found[kind]) >= 0.95 * sum(found["stock"])
        assert all(ours >= 1000 // 32 * 32 for ours in found[kind][1:])


def test_a_prefix_that_is_not_protected_is_counted(model: Path) -> None:
    """Requests without the token in their first 2048 ones, and not those that choose."""
    run = Run(Setting(model, policy=PROTECTING, max_num_batched_tokens=512), log_stats=True)
    plain = random_tokens(random.Random(1), 2048)
    for prompt, extra in (
        (plain, {}),
        ([*plain, END], {"sepllm_window": 60}),
        (plain[:50], {"sepllm_initial_tokens": 9}),
        ([*plain[:50], END, *plain], {}),
        (plain[:50], {"sepllm": False}),
    ):
        run.arrive(prompt, 8, **extra)
    report = run.scheduler._usage.report()
    assert {window: used.unprotected_requests for window, used in report.items()} == {
        "252": 1,
        "60": 1,
    }
    run.finish()
