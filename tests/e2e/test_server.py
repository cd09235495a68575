"""``vllm serve --attention-backend sepllm`` and the openai client: a real server, real traffic."""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.support.oracle import TOLERANCE, Rule, scores
from tests.support.rule import num_kept, spilled
from vllm_sepllm.bench.soak.__main__ import metric, metric_of, metrics_page
from vllm_sepllm.policy.separators.rules import token_separators
from vllm_sepllm.policy.visibility import Policy
from vllm_sepllm.processes import serving
from vllm_sepllm.sample import FOLDER

pytestmark = pytest.mark.slow

POLICY = Policy(4, 124, 512)
CONFIG = {
    "sepllm": {
        "window": POLICY.window,
        "separators": "extended",
        "max_separators": POLICY.max_separators,
    }
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "server.log"


@pytest.fixture(scope="module")
def base_url(four_layers_path: Path, log: Path) -> Iterator[str]:
    """Two API servers, engine core and worker, each a spawned process."""
    command = ["vllm", "serve", str(four_layers_path), "--served-model-name", "smol"]
    command += ["--attention-backend", "sepllm", "--additional-config", json.dumps(CONFIG)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "512"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "32"]
    command += ["--api-server-count", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        with serving(command, log, timeout=240) as base_url:
            yield base_url
    text = log.read_text()
    assert "sepllm keeps the first 4 tokens, the last 124 and up to 512 separators" in text


@pytest.fixture(scope="module")
def client(base_url: str) -> OpenAI:
    return OpenAI(base_url=base_url, api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [p.read_text()[:9000] for p in sorted(FOLDER.glob("*.txt"))]


@pytest.mark.compatibility("`vllm serve`, chat and completions, streaming", "works")
def test_streamed_and_whole_answers_agree(
    base_url: str, client: OpenAI, documents: list[str]
) -> None:
    """Proves chat and completions, streaming and not, on documents far beyond the window.

    The second request finds the first one's prompt in the prefix cache, and /metrics says so.
    """
    prompt = documents[0]
    options = {"model": "smol", "temperature": 0.0, "max_tokens": 40}
    whole = client.completions.create(prompt=prompt, **options)
    pieces = [
        c.choices[0].text for c in client.completions.create(prompt=prompt, stream=True, **options)
    ]
    assert "".join(pieces) == whole.choices[0].text
    assert whole.usage.prompt_tokens > 1500
    assert whole.usage.completion_tokens == 40
    assert metric(base_url, "vllm:prefix_cache_hits_total") > 1000

    messages = [{"role": "user", "content": prompt + "\n\nWhat is this about?"}]
    chat = client.chat.completions.create(messages=messages, **options)
    stream = client.chat.completions.create(messages=messages, stream=True, **options)
    deltas = [c.choices[0].delta.content or "" for c in stream]
    assert "".join(deltas) == chat.choices[0].message.content


def test_concurrent_requests_with_random_aborts(
    base_url: str, client: OpenAI, documents: list[str]
) -> None:
    """Proves that the server survives, that finished answers are right and blocks come back."""
    options = {
        "model": "smol",
        "temperature": 0.0,
        "max_tokens": 120,
        "extra_body": {"ignore_eos": True},
    }
    prompts = [documents[i % len(documents)][200 * i :] for i in range(16)]
    pick = random.Random(0)
    patience = [pick.choice([None, None, 0, 3, 40]) for _ in prompts]

    async def ask(prompt: str, give_up_after: int | None) -> str | None:
        async with AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0) as peer:
            stream = await peer.completions.create(prompt=prompt, stream=True, **options)
            text, num_pieces = "", 0
            async for piece in stream:
                if give_up_after is not None and num_pieces >= give_up_after:
                    await stream.close()
                    return None
                text += piece.choices[0].text
                num_pieces += 1
            return text

    async def ask_all() -> list[str | None]:
        return await asyncio.gather(*(ask(p, g) for p, g in zip(prompts, patience, strict=True)))

    answers = asyncio.run(ask_all())
    finished = [i for i, a in enumerate(answers) if a is not None]
    assert 4 <= len(finished) < 16
    for i in finished[:3]:
        alone = client.completions.create(prompt=prompts[i], **options)
        assert alone.choices[0].text == answers[i]
    assert metric(base_url, "vllm:num_requests_running") == 0
    assert metric(base_url, "vllm:kv_cache_usage_perc") == 0


@pytest.mark.compatibility("A policy per request over HTTP (`vllm_xargs`)", "works, else HTTP 400")
def test_a_request_chooses_its_policy(client: OpenAI, documents: list[str]) -> None:
    """Proves vllm_xargs in chat and completions, and a sentence with HTTP 400 for all nonsense.

    Also for what vLLM's server would drop: a field beside vllm_xargs, also in Anthropic's API, a
    beam search.
    """
    from openai import BadRequestError

    def ask(xargs: dict[str, object] | None, **body: object) -> str:
        extra = body | ({} if xargs is None else {"vllm_xargs": xargs})
        made = client.completions.create(
            model="smol", prompt=documents[1], temperature=0.0, max_tokens=24, extra_body=extra
        )
        return str(made.choices[0].text)

    default, full, small = ask(None), ask({"sepllm": False}), ask({"sepllm_window": 60})
    assert ask({"sepllm": True}) == ask({"sepllm_window": 124}) == default
    assert len({default, full, small}) == 3
    assert ask({"sepllm": False}) == full

    message = {"role": "user", "content": documents[1]}
    chat = {"model": "smol", "messages": [message], "temperature": 0.0, "max_tokens": 24}
    answers = {
        client.chat.completions.create(**chat, extra_body={"vllm_xargs": xargs})
        .choices[0]
        .message.content
        for xargs in ({"sepllm": True}, {"sepllm": False})
    }
    assert len(answers) == 2

    for xargs, body, sentence in (
        ({"sepllm_window": 8}, {}, "sepllm_window must be at least 16 here, got 8"),
        ({"sepllm_window": 0}, {}, "sepllm_window must be at least 16 here, got 0"),
        (
            {"sepllm_window": 64.5},
            {},
            "sepllm_window must be an integer number of tokens",
        ),
        (
            {"sepllm_window": "64"},
            {},
            "sepllm_window must be an integer number of tokens",
        ),
        ({"sepllm_window": 9000}, {}, "at most max_model_len, which is 8192, got 9000"),
        ({"sepllm": "off"}, {}, "sepllm must be true (the engine's policy) or false"),
        ({"sepllm_separators": 3}, {}, "unknown key 'sepllm_separators'"),
        ({"sepllm": False, "sepllm_window": 60}, {}, "give one of the two"),
        (
            {"sepllm_initial_tokens": "9"},
            {},
            "sepllm_initial_tokens must be an integer number of tokens",
        ),
        ({"sepllm_initial_tokens": -1}, {}, "sepllm_initial_tokens must be at least 0 here, got"),
        ({"sepllm_initial_tokens": 9000}, {}, "at most max_model_len, which is 8192, got 9000"),
        ({"sepllm": False, "sepllm_initial_tokens": 9}, {}, "give one of the two"),
        (None, {"sepllm_initial_tokens": 9}, "put it into vllm_xargs"),
        (None, {"sepllm_window": 60}, "put it into vllm_xargs"),
        ({"sepllm": False}, {"use_beam_search": True}, "beam search"),
    ):
        with pytest.raises(BadRequestError) as refused:
            ask(xargs, **body)
        assert sentence in str(refused.value)
        extra = body | ({} if xargs is None else {"vllm_xargs": xargs})
        with pytest.raises(BadRequestError, match="400"):
            client.chat.completions.create(**chat, extra_body=extra)

    asked = {"model": "smol", "max_tokens": 4, "messages": [message], "sepllm_window": 60}
    with pytest.raises(BadRequestError, match="put it into vllm_xargs"):
        client.post("/messages", body=asked, cast_to=object)


@pytest.mark.compatibility("Metrics on `/metrics`", "what is kept, exact")
def test_metrics_show_what_a_request_keeps(
    base_url: str, client: OpenAI, documents: list[str], four_layers_path: Path
) -> None:
    """Proves over the processes of a server that /metrics, read while a request runs, tells its
    logical and kept tokens and saved blocks, after it zero, and counts each spilled separator."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(four_layers_path)
    prompt = tokenizer(documents[2])["input_ids"]
    separators = set(token_separators("extended", tokenizer, len(tokenizer)).token_ids)
    is_separator = [token in separators for token in prompt]
    names = ("logical_tokens", "kept_tokens", "blocks_saved", "checkpoint_blocks")
    names += ("spilled_separators_total",)

    def read() -> dict[str, float]:
        page = metrics_page(base_url)
        return {name: metric_of(page, f"vllm:sepllm_{name}") for name in names}

    before = read()
    running: list[dict[str, float]] = []
    num_requests = 0
    # a report comes once a second, and a fast machine decodes all between two
    while not running and num_requests < 10:
        num_requests += 1
        stream = client.completions.create(
            model="smol",
            prompt=prompt,
            temperature=0.0,
            max_tokens=100,
            stream=True,
            extra_body={"ignore_eos": True, "cache_salt": f"metrics {num_requests}"},
        )
        seen = [read() for _ in stream]
        running = [found for found in seen if found["logical_tokens"] > len(prompt)]
    assert running, "no report while a request decoded"
    for found in running:
        num_tokens = int(found["logical_tokens"])
        kept = num_kept(POLICY, is_separator, num_tokens)
        assert found["kept_tokens"] == kept
        assert found["blocks_saved"] == -(-num_tokens // 32) - -(-kept // 32)
    after = read()
    assert [after[name] for name in names[:3]] == [0, 0, 0]
    assert after["checkpoint_blocks"] > 0
    counted = after["spilled_separators_total"] - before["spilled_separators_total"]
    # the last token is sampled and not computed
    assert counted == num_requests * len(spilled(POLICY, is_separator, len(prompt) + 99))


@pytest.mark.compatibility("Several API servers (`--api-server-count`)", "each metric once")
def test_each_metric_is_there_once(base_url: str) -> None:
    """Proves that the API servers' pages are one, whichever of them answers."""
    for _ in range(4):
        lines = metrics_page(base_url).splitlines()
        names = [line.rpartition(" ")[0] for line in lines if line.startswith("vllm:sepllm")]
        assert names
        assert len(names) == len(set(names))


@pytest.mark.compatibility("`echo` with log-probabilities", "exact")
def test_an_echo_is_the_same_from_a_cached_prefix(
    client: OpenAI, documents: list[str], four_layers_path: Path
) -> None:
    """Proves that a prompt's log-probabilities are computed, whatever the prefix cache holds."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(four_layers_path)
    prompt = tokenizer(documents[3])["input_ids"][:400]
    separators = token_separators("extended", tokenizer, len(tokenizer)).token_ids
    rule = Rule(POLICY.initial_tokens, POLICY.window, frozenset(separators), POLICY.max_separators)
    want = scores(four_layers_path, prompt, rule)
    for _ in range(2):
        made = client.completions.create(
            model="smol", prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0.0
        )
        found = made.choices[0].logprobs.token_logprobs
        assert found[0] is None
        assert found[1 : len(prompt)] == pytest.approx(want.tolist(), abs=TOLERANCE)


@pytest.mark.compatibility("Requests beyond the length of the model", "HTTP 400, as stock vLLM")
def test_a_request_beyond_the_model_length_is_a_client_error(
    base_url: str, client: OpenAI, documents: list[str]
) -> None:
    """Proves that impossible requests are answered with 400 and harm nobody."""
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="8192"):
        client.completions.create(model="smol", prompt=documents[0] * 10, max_tokens=10)
    again = client.completions.create(model="smol", prompt="Hello", max_tokens=3)
    assert again.usage.completion_tokens > 0
