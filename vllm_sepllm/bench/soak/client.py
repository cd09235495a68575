"""A client of a served model, and whether two answers to one request agree."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL_NAME = "soak"
ANSWER_SECONDS = 240
# between batches of other sizes float32 sums differ by less than 1e-4 in a log-probability
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Request:
    """Greedy, exactly ``max_tokens`` long; a lower ``priority`` comes first."""

    prompt: tuple[int, ...]
    max_tokens: int
    policy: dict[str, Any] = field(default_factory=dict)
    priority: int = 0


@dataclass(slots=True)
class Answer:
    """Per position: the token as vLLM names it, and the log-probabilities of the best two."""

    tokens: list[str] = field(default_factory=list)
    best: list[dict[str, float]] = field(default_factory=list)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids in vLLM's names, ``token_id:ID``."""
        return tuple(int(name.removeprefix("token_id:")) for name in self.tokens)


class ServerFault(Exception):
    """The server did what it must not do."""


def verdict(first: Answer, again: Answer) -> str:
    """``same``, ``wrong``, or ``near tie``: they part at a token that float noise may decide."""
    pairs = zip(first.tokens, again.tokens, first.best, again.best, strict=False)
    for one, two, best, best_again in pairs:
        if one != two:
            gap = abs(best.get(one, math.inf) - best.get(two, -math.inf))
            return "near tie" if gap < TOLERANCE else "wrong"
        if abs(best[one] - best_again[two]) > TOLERANCE:
            return "wrong"
    return "same" if len(first.tokens) == len(again.tokens) else "wrong"


class Client:
    """Speaks to a served model as strangers do, streams closed half-way included."""

    def __init__(self, base_url: str) -> None:
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(trust_env=False, timeout=ANSWER_SECONDS, limits=limits)
        self._url = f"{base_url}/completions"
        self._salt = 0
        self._num_open = 0
        self.num_sent = self.num_answered = self.most_at_once = 0

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    def fresh_salt(self) -> str:
        """A salt for a request that must find nothing in the prefix cache."""
        self._salt += 1
        return f"replay-{self._salt}"

    async def ask(
        self, request: Request, *, stop_after: int | None = None, salt: str | None = None
    ) -> Answer:
        """The answer, or its beginning: the connection is cut after ``stop_after`` pieces.

        Raises:
            ServerFault: if the status is not 200, the stream breaks off or is too short.
        """
        body: dict[str, Any] = {
            "model": MODEL_NAME,
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "priority": request.priority,
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": 2,
            "return_tokens_as_token_ids": True,
            "stream": True,
        }
        if request.policy:
            body["vllm_xargs"] = request.policy
        if salt is not None:
            body["cache_salt"] = salt
        self.num_sent += 1
        self._num_open += 1
        self.most_at_once = max(self.most_at_once, self._num_open)
        try:
            answer = await self._stream(body, stop_after)
        finally:
            self._num_open -= 1
        if len(answer.tokens) == request.max_tokens:
            self.num_answered += 1
        elif stop_after is None:
            raise ServerFault(f"{len(answer.tokens)} tokens instead of {request.max_tokens}")
        return answer

    async def _stream(self, body: dict[str, Any], stop_after: int | None) -> Answer:
        answer = Answer()
        async with self._http.stream("POST", self._url, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise ServerFault(f"status {response.status_code}: {text[:300]}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _add(answer, json.loads(line.removeprefix("data: ")))
                if stop_after is not None and len(answer.tokens) >= stop_after:
                    return answer
        return answer

    async def is_refused(self, content: bytes) -> bool:
        """Whether a wrong body gets a 4xx."""
        self.num_sent += 1
        headers = {"content-type": "application/json"}
        response = await self._http.post(self._url, content=content, headers=headers)
        return 400 <= response.status_code < 500


def _add(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        raise ServerFault(f"in mid-stream: {str(event['error'])[:300]}")
    for choice in event["choices"]:
        logprobs = choice["logprobs"] or {"tokens": [], "top_logprobs": []}
        answer.tokens += logprobs["tokens"]
        answer.best += logprobs["top_logprobs"]
