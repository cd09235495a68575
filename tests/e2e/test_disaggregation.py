"""Two engines in two processes: one computes prompts, the other one goes on from its states."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import process_memory
from tests.support.engine import Engine, assert_same, engine
from tests.support.engine_process import MAY_ASK
from tests.support.prefill_instance import PrefillInstance, prefill_instance
from tests.support.process_memory import ProcessMemoryAgent
from tests.support.tiny_engine import ENGINE, NUM_TOKENS, POLICY, check
from tests.support.tiny_models import tiny_text
from vllm_sepllm.processes import HOST

pytestmark = pytest.mark.slow

# of workers in processes of their own
FAKE_NIXL = Path(process_memory.__file__).parent / "fake_nixl"
# shorter than a + n, at its end, beyond it, in several chunks, with settings of the request's own
LENGTHS = [1, 2, 10, 19, 20, 50, 150, 300, 65, 40]
CHOICES: list[dict[str, Any]] = [{}] * 7 + [
    {"sepllm_window": 40},
    {"sepllm": 0},
    {"sepllm_initial_tokens": 30},
]
LONG = 50  # full attention would answer otherwise
PROMPTS = [tiny_text(400 * i, length) for i, length in enumerate(LENGTHS)]


def nixl(role: str) -> dict[str, Any]:
    """The connector's configuration."""
    return {"kv_connector": "NixlConnector", "kv_role": role}


def multi(role: str) -> dict[str, Any]:
    """The same within MultiConnector."""
    members = {"kv_connector_extra_config": {"connectors": [nixl(role)]}}
    return {"kv_connector": "MultiConnector", "kv_role": role} | members


@contextmanager
def two_instances(
    model: Path, folder: Path, connector: Callable[[str], dict[str, Any]] = nixl, **more: Any
) -> Iterator[tuple[PrefillInstance, Engine]]:
    """The prefill instance, and the decode instance whose scheduler is in this process."""
    arguments = ENGINE | {"enforce_eager": True, "skip_tokenizer_init": True} | more
    failures = {"kv_load_failure_policy": "recompute"}
    path = os.pathsep.join([str(FAKE_NIXL), os.environ.get("PYTHONPATH", "")])
    with (
        pytest.MonkeyPatch.context() as patch,
        prefill_instance(
            folder / "prefill.log",
            channel() | {"PYTHONPATH": path},
            model=str(model),
            kv_transfer_config=connector("kv_producer") | failures,
            **arguments,
        ) as prefiller,
    ):
        for name, value in channel().items():
            patch.setenv(name, value)
        process_memory.install(patch.setattr)
        patch.setattr(ProcessMemoryAgent, "bytes_read", 0)
        patch.syspath_prepend(FAKE_NIXL)
        decoding = connector("kv_consumer") | failures
        with engine(model, kv_transfer_config=decoding, **arguments) as decoder:
            assert prefiller.wait() == "ready"
            yield prefiller, decoder


def channel() -> dict[str, str]:
    """Where an instance answers handshakes."""
    from vllm.utils.network_utils import get_open_port

    port = str(get_open_port())
    return {"VLLM_NIXL_SIDE_CHANNEL_HOST": HOST, "VLLM_NIXL_SIDE_CHANNEL_PORT": port}


def bytes_of(decoder: Engine, given: list[dict[str, Any]]) -> int:
    """Bytes of the blocks that the states lie in."""
    kv = decoder.scheduler.kv_cache_config
    (group,) = kv.kv_cache_groups
    num_blocks = sum(len(one["kv_transfer_params"]["remote_block_ids"][0]) for one in given)
    return num_blocks * len(group.layer_names) * group.kv_cache_spec.page_size_bytes


@pytest.mark.compatibility(
    "Prefill/decode disaggregation (NixlConnector)", "tokens and log-probabilities of one process"
)
@pytest.mark.compatibility(
    "A prefill instance that dies, `recompute`", "its requests are computed anew"
)
def test_the_decode_instance_answers_as_one_process(tiny_llama_path: Path, tmp_path: Path) -> None:
    """Proves it for prompts shorter and longer than a + n, in several chunks, with settings of the
    request's own; that each state is moved once and whole; that a peer is refused whose handshake
    differs; and that the requests of one that has died are computed anew.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    with two_instances(tiny_llama_path, tmp_path) as (prefiller, decoder):
        wanted = decoder.generate(PROMPTS, NUM_TOKENS, choices=CHOICES)
        assert decoder.llm.reset_prefix_cache()

        connector: Any = get_kv_transfer_group()
        worker = connector.connector_worker
        ours, worker.compat_hash = worker.compat_hash, "of another engine"
        assert '"window": 16' in ours
        given = prefiller.prefill(PROMPTS[6:8], CHOICES[6:8])
        assert_same(decoder.generate(PROMPTS[6:8], NUM_TOKENS, choices=given), wanted[6:8])
        assert not ProcessMemoryAgent.bytes_read
        worker.compat_hash = ours
        assert decoder.llm.reset_prefix_cache()

        given = prefiller.prefill(PROMPTS, CHOICES)
        assert_same(decoder.generate(PROMPTS, NUM_TOKENS, choices=given), wanted)
        assert ProcessMemoryAgent.bytes_read == bytes_of(decoder, given)

        given = prefiller.prefill(PROMPTS[5:7], CHOICES[5:7])
        prefiller.process.kill()
        prefiller.process.wait()
        assert decoder.llm.reset_prefix_cache()
        assert_same(decoder.generate(PROMPTS[5:7], NUM_TOKENS, choices=given), wanted[5:7])


def bytes_read(worker: Any) -> int:
    """Of one of the decode instance's workers."""
    return ProcessMemoryAgent.bytes_read


@pytest.mark.compatibility(
    "Prefill/decode disaggregation, tensor parallel", "the tokens of one process"
)
def test_tensor_parallel_instances_answer_as_one_process(
    tiny_llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that each of two tensor-parallel workers moves its own heads, once and whole, and that
    the answers are one process's.
    """
    for name, value in MAY_ASK.items():
        monkeypatch.setenv(name, value)
    mine = [i for i, choice in enumerate(CHOICES) if not choice and LENGTHS[i] >= LONG]
    arguments = {"tensor_parallel_size": 2, "disable_log_stats": False}
    with two_instances(tiny_llama_path, tmp_path, **arguments) as (prefiller, decoder):
        given = prefiller.prefill(PROMPTS, CHOICES)
        answers = decoder.generate(PROMPTS, NUM_TOKENS, choices=given)
        moved = bytes_of(decoder, given)
        assert decoder.llm.collective_rpc(bytes_read) == [moved, moved]
        assert received(decoder)["bytes"] == 2 * moved
        assert decoder.llm.reset_prefix_cache()
        assert_same(answers, decoder.generate(PROMPTS, NUM_TOKENS, choices=CHOICES))
    for i in mine:
        check(tiny_llama_path, PROMPTS[i], answers[i].token_ids)


def received(decoder: Engine) -> dict[str, int]:
    """Our counters of what has come from the prefill instance, of all windows."""
    prefix, found = "vllm:sepllm_received_", defaultdict[str, int](int)
    for metric in decoder.llm.get_metrics():
        if metric.name.startswith(prefix):
            found[metric.name.removeprefix(prefix)] += int(metric.value)
    return found


@pytest.mark.compatibility(
    "NixlConnector within MultiConnector", "tokens and log-probabilities of one process"
)
@pytest.mark.compatibility(
    "Metrics of what is moved", "the bytes that were read, beside full attention's"
)
def test_within_multi_connector_and_counted(tiny_llama_path: Path, tmp_path: Path) -> None:
    """Proves that states are moved whole beside a full layer, and that the metrics have the bytes
    that were read and those of a full cache.
    """
    policy = {"sepllm": POLICY | {"full_layers": [0]}}
    arguments = {"additional_config": policy, "disable_log_stats": False}
    prompts, choices = PROMPTS[1:], CHOICES[1:]
    with two_instances(tiny_llama_path, tmp_path, multi, **arguments) as (prefiller, decoder):
        wanted = decoder.generate(prompts, NUM_TOKENS, choices=choices)
        assert decoder.llm.reset_prefix_cache()
        given = prefiller.prefill(prompts, choices)
        assert_same(decoder.generate(prompts, NUM_TOKENS, choices=given), wanted)
        counted, moved = received(decoder), ProcessMemoryAgent.bytes_read
        groups = decoder.scheduler.kv_cache_config.kv_cache_groups
    num_read = [len(prompt) - 1 for prompt in prompts]
    block = sum(len(g.layer_names) * g.kv_cache_spec.page_size_bytes for g in groups)
    assert counted["tokens"] == sum(num_read)
    assert counted["bytes"] == moved > 0
    assert counted["bytes_full"] == sum(-(-number // 32) for number in num_read) * block
    print(f"{counted['bytes'] / counted['tokens']:.0f} bytes a token of {dict(counted)}")
