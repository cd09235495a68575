"""One vLLM engine inside this process: scores texts and answers questions."""

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY

if TYPE_CHECKING:
    from vllm import RequestOutput

# tolerance of two ways to one number: a wrong row differs by whole nats, bfloat16 by less
_ALIGNMENT = 0.2


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model says of a text.

    Attributes:
        logprobs: [num_tokens - 1], log-probability of each token after the first.
        top_ids: [num_tokens - 1], the token that it would have chosen there.
        distributions: [num_positions, vocab_size] float32 log-probabilities of the next token at
            the positions that were asked for.
    """

    logprobs: list[float]
    top_ids: list[int]
    distributions: torch.Tensor


class _Recorder:
    """Keeps the model's last hidden states of the prompt's chosen positions, over all chunks."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._wanted: torch.Tensor | None = None
        self._rows: list[torch.Tensor] = []
        self._num_seen = 0
        model.register_forward_hook(self._see)

    def want(self, positions: Sequence[int]) -> None:
        self._wanted = torch.tensor(positions, dtype=torch.int64)
        self._rows, self._num_seen = [], 0

    def _see(self, _module: torch.nn.Module, _arguments: object, hidden: torch.Tensor) -> None:
        if self._wanted is None:
            return
        first, last = self._num_seen, self._num_seen + len(hidden)
        inside = self._wanted[(self._wanted >= first) & (self._wanted < last)] - first
        self._rows.append(hidden[inside.to(hidden.device)].clone())
        self._num_seen = last

    @torch.inference_mode()
    def distributions(self) -> torch.Tensor:
        self._wanted = None
        # part of the interface that every vLLM model implements
        logits = self._model.compute_logits(torch.cat(self._rows))  # type: ignore[operator]
        return torch.as_tensor(logits).float().log_softmax(dim=-1).cpu()


def llm_arguments(
    settings: Mapping[str, Any] | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``vllm.LLM`` gets for a method; sets the environment that it reads when imported."""
    # one process: the recorder lives where the model does, and engines follow each other
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    selected: dict[str, Any] = {}
    if settings is not None:
        selected["attention_backend"] = "sepllm"
        selected["additional_config"] = {ADDITIONAL_CONFIG_KEY: dict(settings)}
    # prompts of a task begin alike; the KV memory bounds the batch where 64 requests are too many
    fixed = {"enforce_eager": True, "enable_prefix_caching": True, "max_num_seqs": 64, "seed": 0}
    return {**fixed, **arguments, **selected}


class Engine:
    """``vllm.LLM`` with what the suites ask of it."""

    def __init__(self, model: str, settings: Mapping[str, Any] | None, **arguments: Any) -> None:
        given = llm_arguments(settings, arguments)
        from vllm import LLM

        self.llm = LLM(model=model, **given)
        recorders: list[_Recorder] = []
        self.llm.apply_model(lambda module: recorders.append(_Recorder(module)))
        self._recorder = recorders[0]

    def score(self, token_ids: Sequence[int], positions: Sequence[int]) -> Scores:
        """Score a text; ``positions`` are queries whose distribution is wanted, ascending.

        Raises:
            RuntimeError: if the recorded rows are not those of the text.
        """
        from vllm import SamplingParams

        self._recorder.want(positions)
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        (output,) = self.llm.generate([[*token_ids]], sampling, use_tqdm=False)
        entries: Any = output.prompt_logprobs
        logprobs, top_ids = [], []
        for token_id, found in zip(token_ids[1:], entries[1:], strict=True):
            logprobs.append(found[token_id].logprob)
            top_ids.append(next(i for i, entry in found.items() if entry.rank == 1))
        distributions = self._recorder.distributions()
        self._check(token_ids, positions, logprobs, distributions)
        return Scores(logprobs, top_ids, distributions)

    @staticmethod
    def _check(
        token_ids: Sequence[int],
        positions: Sequence[int],
        logprobs: Sequence[float],
        distributions: torch.Tensor,
    ) -> None:
        known = [(row, p) for row, p in enumerate(positions) if p < len(logprobs)]
        own = torch.tensor([float(distributions[row, token_ids[p + 1]]) for row, p in known])
        apart = (own - torch.tensor([logprobs[p] for _, p in known])).abs().median()
        if apart > _ALIGNMENT:
            raise RuntimeError(
                f"recorded distributions differ from vLLM's prompt_logprobs by {apart:.2f} nats: "
                "the model's forward pass does not return one row per token; run without "
                "tensor parallelism and without padding"
            )

    def generate(
        self, prompts: Sequence[Sequence[int]], **sampling: Any
    ) -> Iterator[tuple[int, "RequestOutput"]]:
        """Greedy requests in one batch: number of the prompt and vLLM's output, as they finish."""
        from vllm import RequestOutput, SamplingParams

        engine = self.llm.llm_engine
        for number, token_ids in enumerate(prompts):
            given = SamplingParams(temperature=0.0, **sampling)
            engine.add_request(str(number), {"prompt_token_ids": list(token_ids)}, given)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    assert isinstance(output, RequestOutput), "no pooling model"
                    yield int(output.request_id), output


@contextmanager
def running(model: str, settings: Mapping[str, Any] | None, **arguments: Any) -> Iterator[Engine]:
    """An engine whose memory is given back afterwards."""
    engine = Engine(model, settings, **arguments)
    try:
        yield engine
    finally:
        del engine.llm, engine._recorder
        gc.collect()
