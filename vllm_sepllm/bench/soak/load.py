"""Random requests for a server."""

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from vllm_sepllm.bench.soak.client import MODEL_NAME, Answer, Client, Request, ServerFault
from vllm_sepllm.bench.soak.invalid import wrong_fields

MAX_MODEL_LEN = 2048
MAX_NEW_TOKENS = 48
NUM_PEERS = 6
BURST = 12
# half of a burst are short prompts, whose answers grow while the others fill the pool
GROWING_TOKENS = 160
GROWING_POLICY = {"sepllm_window": 500}
NUM_TURNS = 5
NUM_PRIORITIES = 3
SEPARATOR_SHARE = 0.15
# kinds of requests that are faults on purpose: of clients, or more than the server can hold
INJECTED = (
    "disconnect in mid-answer",
    "abort before the first token",
    "invalid",
    "burst beyond the pool",
)
# what requests say of their own policy (vllm_xargs), each as often
REQUEST_POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"sepllm_window": 24},
    {"sepllm_window": 500},
    {"sepllm_initial_tokens": 120},
    {"sepllm": False},
)


@dataclass(slots=True)
class Tally:
    """What was sent and what came back.

    Attributes:
        sent: kind of request -> number.
        finished: answers that are not checked yet.
        lost: requests that had to be answered and were not.
        faults: what the server must not do, one line each.
    """

    sent: Counter[str] = field(default_factory=Counter)
    finished: list[tuple[Request, Answer]] = field(default_factory=list)
    lost: int = 0
    faults: list[str] = field(default_factory=list)


class Traffic:
    """Peers that send random requests; the same seed sends the same ones."""

    def __init__(self, client: Client, vocab_size: int, separators: list[int], seed: int) -> None:
        self._client = client
        self._vocab_size = vocab_size
        self._separators = separators
        self._random = random.Random(seed)
        self.tally = Tally()
        # kind -> (how often, what it does)
        self._kinds: dict[str, tuple[int, Callable[[], Any]]] = {
            "plain": (8, self._plain),
            "prefix reuse": (6, self._prefix_reuse),
            "repeated prompt": (3, self._repeated),
            "conversation": (2, self._conversation),
            "disconnect in mid-answer": (4, self._disconnect),
            "abort before the first token": (4, self._abort),
            "invalid": (4, self._invalid),
            "burst beyond the pool": (1, self._burst),
        }
        # a short run sends each kind too
        self._opening = list(self._kinds)

    async def run(self, seconds: float) -> None:
        """Send for a while, then wait for every answer."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds

        async def peer() -> None:
            while loop.time() < end:
                kind = self._next_kind()
                self.tally.sent[kind] += 1
                await self._guard(kind, self._kinds[kind][1]())

        await asyncio.gather(*(peer() for _ in range(NUM_PEERS)))

    def _next_kind(self) -> str:
        if self._opening:
            return self._opening.pop()
        weights = [weight for weight, _ in self._kinds.values()]
        (kind,) = self._random.choices(list(self._kinds), weights)
        return kind

    async def _guard(self, kind: str, action: Any) -> None:
        try:
            await action
        except (ServerFault, httpx.HTTPError, json.JSONDecodeError) as error:
            self.tally.lost += 1
            self.tally.faults.append(f"{kind}: {type(error).__name__} {error}")

    # ------------------------------------------------------------------ prompts

    def _tokens(self, num_tokens: int) -> tuple[int, ...]:
        pick = self._random
        return tuple(
            pick.choice(self._separators)
            if pick.random() < SEPARATOR_SHARE
            else pick.randrange(self._vocab_size)
            for _ in range(num_tokens)
        )

    def _request(self, prompt: tuple[int, ...], like: Request | None = None) -> Request:
        """A request; mostly with the policy of the one that it is ``like``, for cache hits."""
        is_alike = like is not None and self._random.random() < 0.75
        policy = like.policy if like and is_alike else self._random.choice(REQUEST_POLICIES)
        max_tokens = self._random.randint(1, MAX_NEW_TOKENS)
        return Request(prompt, max_tokens, policy, self._random.randrange(NUM_PRIORITIES))

    def long_request(self) -> Request:
        """One that has more than any window, and separators that left it."""
        return Request(self._tokens(700), 2)

    def _like(self) -> Request:
        """One that was answered lately, whose checkpoints a small pool may still hold."""
        finished = [request for request, _ in self.tally.finished[-4:]]
        return self._random.choice(finished or [Request(self._tokens(300), 1)])

    def _length(self) -> int:
        """Short and long ones alike: uniform in the exponent."""
        longest = MAX_MODEL_LEN - MAX_NEW_TOKENS
        return min(longest, round(math.exp(self._random.uniform(0.0, math.log(longest)))))

    async def _answer(self, request: Request) -> Answer:
        answer = await self._client.ask(request)
        self.tally.finished.append((request, answer))
        return answer

    # ------------------------------------------------------------------ kinds of requests

    async def _plain(self) -> None:
        await self._answer(self._request(self._tokens(self._length())))

    async def _prefix_reuse(self) -> None:
        like = self._like()
        kept = like.prompt[: self._random.randint(1, len(like.prompt))]
        room = MAX_MODEL_LEN - MAX_NEW_TOKENS - len(kept)
        tail = self._tokens(self._random.randint(0, min(200, room)))
        await self._answer(self._request(kept + tail, like))

    async def _repeated(self) -> None:
        request = self._request(self._tokens(self._length()))
        for _ in range(2):
            await self._answer(request)

    async def _conversation(self) -> None:
        request = self._request(self._tokens(self._random.randint(20, 400)))
        for _ in range(NUM_TURNS):
            answer = await self._answer(request)
            news = self._tokens(self._random.randint(1, 150))
            request = replace(request, prompt=request.prompt + answer.token_ids + news)

    async def _disconnect(self) -> None:
        request = self._request(self._tokens(self._length()))
        await self._client.ask(request, stop_after=self._random.randint(1, request.max_tokens))

    async def _abort(self) -> None:
        request = self._request(self._tokens(self._length()))
        task = asyncio.create_task(self._client.ask(request))
        await asyncio.wait([task], timeout=self._random.uniform(0.0, 0.3))
        if not task.cancel():
            self.tally.finished.append((request, task.result()))
            return
        await asyncio.wait([task])

    async def _burst(self) -> None:
        longest = MAX_MODEL_LEN - MAX_NEW_TOKENS
        lengths = [self._random.randint(longest // 2, longest) for _ in range(BURST // 2)]
        requests = [self._request(self._tokens(n)) for n in lengths]
        for _ in range(BURST - BURST // 2):
            growing = self._request(self._tokens(self._random.randint(60, 200)))
            growing = replace(growing, max_tokens=GROWING_TOKENS, policy=GROWING_POLICY)
            requests.insert(self._random.randrange(len(requests) + 1), growing)
        await asyncio.gather(*(self._guard("burst", self._answer(r)) for r in requests))

    async def _invalid(self) -> None:
        prompt = list(self._tokens(20))
        wrong = self._random.choice(wrong_fields(prompt, self._vocab_size, MAX_MODEL_LEN))
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 4, "temperature": 0.0}
        content = json.dumps(body | wrong).encode()
        if self._random.random() < 0.1:
            content, wrong = content[:-9], {"cut off": True}
        if not await self._client.is_refused(content):
            self.tally.faults.append(f"invalid: {str(wrong)[:80]} was not refused with 4xx")
