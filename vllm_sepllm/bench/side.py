"""One side of a comparison: an engine in a process of its own that answers commands.

Started by :mod:`vllm_sepllm.bench.sides`. Reads one JSON command a line from standard input and
answers with one JSON line on the file descriptor given to it. ``LLM.generate`` returns when the
tokens are on the host, so nothing of a GPU's work is left out of a time.
"""

import json
import os
import sys
import time
from typing import Any

from vllm_sepllm.policy.layout import compact_length, num_left_window
from vllm_sepllm.policy.separators.index import SeparatorIndex

# those that say which path of the engine ran
COUNTERS = (
    "vllm:num_preemptions",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
    "vllm:sepllm_restored_tokens",
)


class Side:
    """``vllm.LLM`` behind a few commands."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**arguments)

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int | list[int],
        ignore_eos: bool = True,
        logprobs: bool = False,
        transfers: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Greedy answers to all prompts at once, with seconds of the whole and of each request.

        Also CPU seconds of this thread, and tokens from the prefix cache; with ``logprobs`` the
        log-probabilities of the answers. ``transfers`` are the kv_transfer_params of each prompt;
        the answer has those for the next instance.
        """
        from vllm import SamplingParams

        limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        nothing: list[Any] = [None] * len(prompts)
        sampling = [
            SamplingParams(
                temperature=0.0,
                max_tokens=n,
                ignore_eos=ignore_eos,
                detokenize=False,
                logprobs=0 if logprobs else None,
                extra_args=None if transfer is None else {"kv_transfer_params": transfer},
            )
            for n, transfer in zip(limits, transfers or nothing, strict=True)
        ]
        inputs: Any = [{"prompt_token_ids": ids} for ids in prompts]
        start, cpu_start = time.perf_counter(), time.thread_time()
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.thread_time() - cpu_start,
            "token_ids": [list(o.outputs[0].token_ids) for o in outputs],
            "requests": [_times(o.metrics) for o in outputs],
            "num_cached_tokens": [o.num_cached_tokens or 0 for o in outputs],
            "logprobs": [_logprobs(o.outputs[0]) for o in outputs] if logprobs else None,
            "transfers": [o.kv_transfer_params for o in outputs],
        }

    def cpu_seconds(self) -> float:
        """Of all threads of this process, so far."""
        return time.process_time()

    def received_bytes(self) -> int:
        """Bytes that NIXL has read so far, by its own count: vLLM's histogram."""
        metrics: list[Any] = self.llm.get_metrics()  # of several types; histograms have a sum
        return sum(int(m.sum) for m in metrics if m.name == "vllm:nixl_bytes_transferred")

    def counters(self) -> dict[str, int]:
        """vLLM's counters of all that was asked so far, by the names of /metrics."""
        found: dict[str, int] = {}
        metrics: list[Any] = self.llm.get_metrics()  # of several types; counters have a value
        for metric in metrics:
            if metric.name in COUNTERS:
                found[metric.name] = found.get(metric.name, 0) + int(metric.value)
        return found

    def parts(self) -> dict[str, str]:
        """What the engine is made of; see :func:`vllm_sepllm.integration.rigs.parts.parts_of`."""
        # not at the top: vLLM takes seconds to import
        from vllm_sepllm.integration.rigs.parts import parts_of

        return parts_of(self.llm)

    def compact_length(self, prompt: list[int]) -> int:
        """Entries that the cache of ``prompt`` holds; its length if this side is stock vLLM."""
        # not at the top: vLLM takes seconds to import
        from vllm_sepllm.integration.wire.config import is_selected, read_config

        vllm_config = self.llm.llm_engine.vllm_config
        if not is_selected(vllm_config):
            return len(prompt)
        config = read_config(vllm_config)
        index = SeparatorIndex(config.policy, config.separators)
        left = num_left_window(config.policy, len(prompt))
        index.extend(prompt, left)
        return compact_length(config.policy, len(prompt), index.count_below(left))


def _logprobs(completion: Any) -> list[float]:
    """Of each token of an answer."""
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return [at[token].logprob for token, at in pairs]


def _times(metrics: Any) -> dict[str, float]:
    """vLLM's own time stamps of a request, in seconds of one clock."""
    names = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
    return {name: getattr(metrics, name) for name in names}


def main() -> None:
    """Answer commands until standard input ends."""
    answers = os.fdopen(int(sys.argv[1]), "w")
    side = Side(json.loads(sys.argv[2]))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(side, command.pop("do"))(**command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
