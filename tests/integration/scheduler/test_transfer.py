"""States that move from a prefill to a decode instance, over two real schedulers.

Workers have labels instead of KV: every read is compared with the rule, so an entry that is
missing, stale or of another request shows (labelled_worker.py). No NIXL is needed.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.support.instances import Instance, answer_to
from tests.support.schedulers import (
    Setting,
    answer,
    make_request,
    make_scheduler,
    random_tokens,
    write_model,
)
from vllm_sepllm.integration.wire.plan import attached_plan

POLICY = (("initial_tokens", 3), ("window", 28), ("max_separators", 60))
OTHER = (("initial_tokens", 3), ("window", 40), ("max_separators", 60))
RENUMBERED = (
    *POLICY[:2],
    ("max_separators", 20),
    ("positions", "renumbered"),
    ("max_position", 120),
)
CHECKPOINTS = (("checkpoint_interval", 96),)
MAX_TOKENS = 6
Make = Callable[..., Instance]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    model = write_model(tmp_path_factory.mktemp("model"))

    def instance(
        policy: tuple[tuple[str, Any], ...] = POLICY, failures: Any = "recompute", **more: Any
    ) -> Instance:
        return Instance(Setting(model, policy=policy + CHECKPOINTS, load_failures=failures, **more))

    return instance


def prefilled(instance: Instance, name: str, prompt: list[int], **extra: Any) -> dict[str, Any]:
    """What the prefill instance answers with."""
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    instance.arrive(name, prompt, 1, kv_transfer_params=params, **extra)
    while name not in instance.params:
        instance.step()
    return instance.params[name]


def finish(decoder: Instance, prefiller: Instance) -> None:
    """Let everything arrive and end."""
    for _ in range(400):
        if decoder.is_empty and prefiller.is_empty:
            return
        for read in decoder.reads:
            decoder.arrives(read, prefiller)
            prefiller.was_read(read.source)
        for name in decoder.unread:
            prefiller.was_read(name)
        decoder.reads, decoder.unread = [], set()
        decoder.step()
        prefiller.step()
    raise AssertionError("blocks are held, or requests wait for ever")


@pytest.mark.parametrize("num_tokens", [1, 2, 30, 31, 32, 33, 64, 65, 96, 97, 250])
def test_the_decode_instance_goes_on_from_all_tokens_but_the_last(
    make: Make, num_tokens: int
) -> None:
    prefiller, decoder = make(), make()
    prompt = random_tokens(random.Random(num_tokens), num_tokens)
    params = prefilled(prefiller, "there", prompt)
    decoder.arrive("here", prompt, MAX_TOKENS, kv_transfer_params=params)
    decoder.step()
    (read,) = decoder.reads
    assert [len(blocks) for blocks in read.targets] == [len(blocks) for blocks in read.sources]
    for _ in range(3):
        decoder.step()
    assert "here" not in decoder.first_start, "it waits for its state"
    assert not prefiller.is_empty, "a state is held until it is read"
    finish(decoder, prefiller)
    assert decoder.first_start["here"] == num_tokens - 1
    assert decoder.tokens["here"] == answer_to(prompt, MAX_TOKENS)


def test_what_was_received_is_found_by_the_next_turn(make: Make) -> None:
    prefiller, decoder = make(), make()
    prompt = random_tokens(random.Random(0), 150)
    params = prefilled(prefiller, "there", prompt)
    decoder.arrive("here", prompt, MAX_TOKENS, kv_transfer_params=params)
    finish(decoder, prefiller)
    turn = [*prompt, *decoder.tokens["here"], *random_tokens(random.Random(1), 9)]
    decoder.arrive("next", turn, MAX_TOKENS)
    finish(decoder, prefiller)
    assert decoder.first_start["next"] == len(turn) - 10


def test_a_state_is_read_whole_unless_all_of_it_is_cached(make: Make) -> None:
    prefiller, decoder = make(), make()
    prompt = random_tokens(random.Random(0), 200)
    decoder.arrive("before", prompt[:150], MAX_TOKENS)
    finish(decoder, prefiller)
    params = prefilled(prefiller, "there", prompt)
    decoder.arrive("here", prompt, 1, kv_transfer_params=dict(params))
    decoder.step()
    assert [len(blocks) for blocks in decoder.reads[0].targets] == [
        len(blocks) for blocks in params["remote_block_ids"]
    ]
    finish(decoder, prefiller)
    # ended after one token, it has left its state after 200 tokens
    prompt.append(decoder.tokens["here"][0])
    params = prefilled(prefiller, "there again", prompt)
    decoder.arrive("here again", prompt, MAX_TOKENS, kv_transfer_params=params)
    decoder.step()
    assert not decoder.reads
    assert decoder.unread == {"there again"}
    assert decoder.first_start["here again"] == 200
    finish(decoder, prefiller)


@pytest.mark.parametrize("by_block", [True, False])
@pytest.mark.parametrize("failures", ["recompute", "fail"])
def test_a_lost_state_is_computed_anew_or_ends_the_request(
    make: Make, failures: str, by_block: bool
) -> None:
    prefiller, decoder = make(), make(failures=failures)
    prompt = random_tokens(random.Random(0), 200)
    params = prefilled(prefiller, "there", prompt)
    decoder.arrive("here", prompt, MAX_TOKENS, kv_transfer_params=params)
    decoder.step()
    decoder.is_lost(decoder.reads.pop(), by_block=by_block)
    prefiller.was_read("there")
    finish(decoder, prefiller)
    assert ("here" in decoder.errors) == (failures == "fail")
    assert decoder.first_start.get("here", 0) == 0
    answer = answer_to(prompt, MAX_TOKENS) if failures == "recompute" else []
    assert decoder.tokens["here"] == answer
    # nothing of what never came may be found
    decoder.arrive("after", [*prompt, 3, 4], MAX_TOKENS)
    finish(decoder, prefiller)


def test_a_lost_state_does_not_keep_those_that_have_arrived_waiting(make: Make) -> None:
    """To compute a prompt takes more blocks of a sliding window than to read its state: more than
    are free, until the request behind it, whose state is here, has ended.
    """
    prefiller, decoder = make(with_sliding=True), make(with_sliding=True, num_blocks=14)
    for number, name in enumerate(("lost", "here")):
        prompt = random_tokens(random.Random(number), 190)
        params = prefilled(prefiller, f"{name} there", prompt)
        decoder.arrive(name, prompt, MAX_TOKENS, kv_transfer_params=params)
    decoder.step()
    lost, arrived = decoder.reads
    decoder.reads.clear()
    decoder.is_lost(lost, by_block=False)
    decoder.arrives(arrived, prefiller)
    for read in (lost, arrived):
        prefiller.was_read(read.source)
    finish(decoder, prefiller)
    assert decoder.ended == {"lost", "here"}


def test_nothing_is_found_of_a_state_whose_request_was_aborted(make: Make) -> None:
    prefiller, decoder = make(), make()
    prompt = random_tokens(random.Random(0), 200)
    params = prefilled(prefiller, "there", prompt)
    decoder.arrive("here", prompt, MAX_TOKENS, kv_transfer_params=params)
    decoder.step()
    decoder.abort("here")
    decoder.step()
    assert not decoder.is_empty, "the transfer may still write its blocks"
    decoder.is_lost(decoder.reads.pop(), by_block=False)
    prefiller.was_read("there")
    finish(decoder, prefiller)
    decoder.arrive("after", [*prompt, 3, 4], MAX_TOKENS)
    finish(decoder, prefiller)
    assert decoder.first_start["after"] == 0


def test_no_state_arrives_in_a_block_that_a_step_still_writes(make: Make) -> None:
    """A transfer is not ordered against the steps in flight: vLLM defers what they free, as on GPUs
    with asynchronous scheduling, and a checkpoint's blocks are filled by a step, too.
    """
    decoder = make_scheduler(make(kind="async").setting)
    decoder.defer_block_free = True
    prompt = random_tokens(random.Random(0), 150)
    decoder.add_request(make_request("here", prompt, MAX_TOKENS))
    pool = decoder.kv_cache_manager.block_pool
    output = decoder.schedule()
    planned = attached_plan(output)
    assert planned is not None
    (checkpoint,) = planned.listed[0].checkpoints
    filled = [pool.blocks[i] for blocks in checkpoint.blocks.values() for i in blocks.values()]
    assert filled
    assert all(block.ref_cnt for block in filled)
    answer(decoder, output, 2)
    assert not any(block.ref_cnt for block in filled)


MISMATCHES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("the engines' windows", {"policy": OTHER}, {}, "window is 28 here and 40 there"),
    ("the request's window", {}, {"sepllm_window": 40}, "window is 28 here and 40 there"),
    (
        "initial tokens",
        {"policy": (("initial_tokens", 9), *POLICY[1:])},
        {},
        "initial_tokens is 3 here and 9 there",
    ),
    ("separators", {"policy": (*POLICY, ("separators", (1, 2)))}, {}, "separators is"),
    (
        "the bound",
        {"policy": (*POLICY[:2], ("max_separators", 61))},
        {},
        "max_separators is 60 here and 61 there",
    ),
    (
        "positions",
        {"policy": (*POLICY, ("positions", "renumbered"), ("max_position", 4096))},
        {},
        "max_position is None here and 4096 there",
    ),
    (
        "workers",
        {"tensor_parallel_size": 2},
        {},
        "tensor_parallel_size is 1 here and 2 there",
    ),
]


@pytest.mark.parametrize("failures", ["recompute", "fail"])
@pytest.mark.parametrize(
    ("there", "chosen", "sentence"),
    [case[1:] for case in MISMATCHES],
    ids=[case[0] for case in MISMATCHES],
)
def test_a_state_of_other_settings_is_not_read(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    there: dict[str, Any],
    chosen: dict[str, Any],
    sentence: str,
    failures: str,
) -> None:
    warnings = heard(monkeypatch)
    prefiller, decoder = make(**there), make(failures=failures)
    prompt = random_tokens(random.Random(0), 100)
    params = prefilled(prefiller, "there", prompt, **chosen)
    decoder.arrive("here", prompt, MAX_TOKENS, kv_transfer_params=params)
    finish(decoder, prefiller)
    (warning,) = warnings
    assert sentence in warning
    assert ("here" in decoder.errors) == (failures == "fail")
    answer = answer_to(prompt, MAX_TOKENS) if failures == "recompute" else []
    assert decoder.tokens["here"] == answer


def test_a_producer_reads_no_state(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would free and fill blocks while a transfer writes them: it goes by the role."""
    warnings = heard(monkeypatch)
    prefiller, decoder = make(), make()
    prompt = random_tokens(random.Random(0), 100)
    params = prefilled(prefiller, "there", prompt)
    transfers = decoder.scheduler.vllm_config.kv_transfer_config
    assert transfers is not None
    monkeypatch.setattr(transfers, "kv_role", "kv_producer")
    decoder.arrive("here", prompt, MAX_TOKENS, kv_transfer_params=params)
    finish(decoder, prefiller)
    (warning,) = warnings
    assert "kv_role is kv_producer here, which reads no states" in warning
    assert decoder.tokens["here"] == answer_to(prompt, MAX_TOKENS)


def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the scheduler warns of."""
    found: list[str] = []
    monkeypatch.setattr(
        "vllm_sepllm.integration.scheduler.scheduler.logger.warning",
        lambda text, *values: found.append(text % values),
    )
    return found


def test_a_state_of_another_text_or_of_stock_vllm_is_not_read(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings = heard(monkeypatch)
    prefiller, decoder = make(), make()
    prompt = random_tokens(random.Random(0), 100)
    params = prefilled(prefiller, "there", prompt)
    decoder.arrive("other", [9, *prompt[1:]], MAX_TOKENS, kv_transfer_params=dict(params))
    finish(decoder, prefiller)
    params = prefilled(prefiller, "there too", prompt)
    del params["sepllm"]
    decoder.arrive("stock", prompt, MAX_TOKENS, kv_transfer_params=params)
    finish(decoder, prefiller)
    assert decoder.tokens["other"] == answer_to([9, *prompt[1:]], MAX_TOKENS)
    assert decoder.tokens["stock"] == answer_to(prompt, MAX_TOKENS)
    assert "tokens is" in warnings[0]
    assert "does not say that it serves with sepllm" in warnings[1]


def test_without_a_connector_a_request_is_computed_where_it_is(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings = heard(monkeypatch)
    prefiller, decoder = make(), make(failures=None)
    prompt = random_tokens(random.Random(0), 100)
    params = prefilled(prefiller, "there", prompt)
    decoder.arrive("here", prompt, 1, kv_transfer_params=params)
    decoder.step()
    assert decoder.first_start == {"here": 0}
    assert not warnings
