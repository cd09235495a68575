"""Prefill and decode on two instances of each side: what the second one reads, and how soon.

A prompt's first token comes from a decode instance twice: once it reads the KV of all tokens but
the last from the prefill instance, once it computes the prompt itself.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_sepllm.bench.results import Results
from vllm_sepllm.bench.sides import SideProcess, arguments_of, started
from vllm_sepllm.bench.suites import GATE_TOKENS, Work
from vllm_sepllm.processes import HOST, free_port

_REMOTE = {"do_remote_decode": True, "do_remote_prefill": False}
_GATE_ANSWER = 8


@dataclass(frozen=True, slots=True)
class Pair:
    """The two instances of a side."""

    prefill: SideProcess
    decode: SideProcess

    def prefilled(self, prompt: list[int]) -> list[dict[str, Any]]:
        """Compute the prompt; returns what the decode instance needs to read it."""
        with self.prefill.awake():
            answer = self.prefill.do(
                "generate", prompts=[prompt], max_tokens=1, transfers=[_REMOTE]
            )
        transfers: list[dict[str, Any]] = answer["transfers"]
        return transfers

    def decoded(
        self, prompt: list[int], max_tokens: int, transfers: list[dict[str, Any]] | None
    ) -> dict[str, Any]:
        """The decode instance's answer; it computes the prompt if ``transfers`` is None.

        Adds ``received_bytes``, and ``all_cpu_seconds`` of both instances' threads.
        """
        with ExitStack() as stack:
            running = [self.decode] if transfers is None else [self.prefill, self.decode]
            for instance in running:
                stack.enter_context(instance.awake())
            cpu = sum(instance.do("cpu_seconds") for instance in running)
            num_bytes = self.decode.do("received_bytes")
            answer: dict[str, Any] = self.decode.do(
                "generate", prompts=[prompt], max_tokens=max_tokens, transfers=transfers
            )
            return answer | {
                "received_bytes": self.decode.do("received_bytes") - num_bytes,
                "all_cpu_seconds": sum(instance.do("cpu_seconds") for instance in running) - cpu,
            }


@contextmanager
def pairs(
    names: list[str], model: str, common: dict[str, Any], logs: Path
) -> Iterator[dict[str, Pair]]:
    """Two engines a side, joined by vLLM's NixlConnector.

    Args:
        names: of the sides.
        model: folder, or name in the cache.
        common: arguments of all engines.
        logs: folder.
    """
    with ExitStack() as stack:

        def start(side: str, role: str) -> SideProcess:
            transfer = {"kv_connector": "NixlConnector", "kv_role": role}
            arguments = arguments_of(side, model, common) | {"kv_transfer_config": transfer}
            channel = {
                "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST,
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            }
            instance = stack.enter_context(started(f"{side}-{role}", arguments, logs, channel))
            with instance.awake():  # and it stands still from now on
                return instance

        Console(stderr=True).print(f"starting two engines each of {', '.join(names)}")
        roles = ("kv_producer", "kv_consumer")
        jobs = [(side, role) for side in names for role in roles]
        # all at once: most of a start is imports
        with ThreadPoolExecutor(len(jobs)) as pool:
            instances = dict(zip(jobs, pool.map(lambda job: start(*job), jobs), strict=True))
        yield {side: Pair(*(instances[side, role] for role in roles)) for side in names}


def read_and_compute(found: dict[str, Pair], work: Work, results: Results) -> None:
    """The first token both ways, all sides in turn.

    NIXL's threads poll, so an instance runs only while it has work, and ``read_cpu_s`` is the
    engine's thread alone; ``read_all_cpu_s`` has all threads of both instances, polling included.

    Raises:
        RuntimeError: if an instance answers a prompt otherwise when it reads it, or if it
            has read nothing.
    """
    for name, pair in found.items():
        _gate(name, pair, work)
    for number in range(work.rounds):
        for length in work.lengths:
            prompt = work.prompt(number, length)
            for name, pair in found.items():
                results.add(f"{length} tokens", name, **_measured(name, pair, prompt))


def _gate(name: str, pair: Pair, work: Work) -> None:
    # of a compact state one token: in bfloat16 either way may part from the other before long
    for length, num_tokens in ((GATE_TOKENS, _GATE_ANSWER), (min(work.lengths), 1)):
        prompt = work.prompt(0, length)
        transfers = pair.prefilled(prompt)
        read, computed = (
            pair.decoded(prompt, num_tokens, given)["token_ids"] for given in (transfers, None)
        )
        if read != computed:
            raise RuntimeError(f"{name} answers {read} to what it read, {computed} to the text")


def _measured(name: str, pair: Pair, prompt: list[int]) -> dict[str, float]:
    transfers = pair.prefilled(prompt)
    read, computed = (pair.decoded(prompt, 1, given) for given in (transfers, None))
    if not read["received_bytes"]:
        raise RuntimeError(f"{name} has read nothing of a prompt of {len(prompt)} tokens")
    return {
        "received_bytes": read["received_bytes"],
        "read_cpu_s": read["cpu_seconds"],
        "read_all_cpu_s": read["all_cpu_seconds"],
        "compute_cpu_s": computed["cpu_seconds"],
        "read_s": read["seconds"],
        "compute_s": computed["seconds"],
    }
