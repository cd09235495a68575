"""What the metrics say of states that arrive from a prefill instance."""

import random
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.support.instances import Instance
from tests.support.rule import num_kept
from tests.support.schedulers import (
    BLOCK,
    FULL,
    SEPARATOR,
    Setting,
    make_request,
    random_tokens,
    write_model,
)
from vllm_sepllm.integration.scheduler.usage import KvUsage
from vllm_sepllm.policy.visibility import Policy

POLICY = (("initial_tokens", 3), ("window", 28), ("max_separators", 60))
NUM_TOKENS = 250
Make = Callable[..., Instance]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    model = write_model(tmp_path_factory.mktemp("model"))

    def instance(**more: Any) -> Instance:
        return Instance(Setting(model, policy=POLICY, load_failures="recompute", **more))

    return instance


def asked(prefiller: Instance, decoder: Instance, **chosen: Any) -> list[int]:
    """A prompt whose state the decode instance is about to read."""
    prompt = random_tokens(random.Random(0), NUM_TOKENS)
    there = {"do_remote_decode": True, "do_remote_prefill": False}
    prefiller.arrive("there", prompt, 1, kv_transfer_params=there, **chosen)
    while "there" not in prefiller.params:
        prefiller.step()
    given = prefiller.params["there"]
    decoder.arrive("here", prompt, 2, kv_transfer_params=given, **chosen)
    decoder.step()
    return prompt


def watch(decoder: Instance) -> KvUsage:
    usage: KvUsage = decoder.scheduler._coordinator.watch(8192)
    decoder.scheduler._usage = usage
    return usage


def blocks(num_entries: int) -> int:
    return -(-num_entries // BLOCK)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("with_full", [False, True])
def test_bytes_are_those_of_the_blocks_that_are_read(
    make: Make, with_full: bool, num_workers: int
) -> None:
    """Beside those that full attention has; other layers are read in full either way."""
    more = {"with_full": with_full, "tensor_parallel_size": num_workers}
    prefiller, decoder = make(**more), make(**more)
    usage = watch(decoder)
    prompt = asked(prefiller, decoder, sepllm_window=40)
    assert usage.report()["40"].received_tokens == 0, "it is on its way"
    decoder.arrives(decoder.reads.pop(), prefiller)
    while not decoder.tokens["here"]:
        decoder.step()
    received = usage.report()["40"]
    assert received.received_tokens == NUM_TOKENS - 1
    is_separator = [token == SEPARATOR for token in prompt]
    kept = blocks(num_kept(Policy(3, 40, 60), is_separator, NUM_TOKENS - 1))
    full, others = blocks(NUM_TOKENS - 1), blocks(NUM_TOKENS - 1) if with_full else 0
    size = FULL.page_size_bytes * num_workers
    assert kept < full
    assert received.received_bytes == (kept + others) * size
    assert received.received_bytes_full == (full + others) * size
    assert usage.report()["40"].received_tokens == 0, "counters have what is new"


def test_a_state_that_is_lost_is_not_counted(make: Make) -> None:
    prefiller, decoder = make(), make()
    usage = watch(decoder)
    asked(prefiller, decoder)
    decoder.is_lost(decoder.reads.pop(), by_block=True)
    while not decoder.tokens["here"]:
        decoder.step()
    assert usage.report()["28"].received_tokens == 0


@pytest.mark.parametrize("ends_at_once", [False, True])
def test_only_requests_that_run_are_warned_of_a_state_that_does_not_fit(
    make: Make, ends_at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """What vLLM's server sends for a request that it rejected: one token, and the state to free."""
    prefiller, decoder = make(), make()
    asked(prefiller, decoder)
    # vLLM notes in the parameters that they were read
    given = prefiller.params["there"] | {"do_remote_prefill": True}
    extra = {"kv_transfer_params": given}
    request = make_request("rejected", [0], 1, extra_args=extra, abort_immediately=ends_at_once)
    decoder.scheduler.add_request(request)
    assert ("request rejected computes its prompt here" in caplog.text) is not ends_at_once
