"""``vllm run-batch``: a file of requests, each with a policy of its own."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.oracle import Rule, greedy
from vllm_sepllm.policy.separators.rules import token_separators
from vllm_sepllm.processes import child_environment
from vllm_sepllm.sample import FOLDER

pytestmark = pytest.mark.slow

MAX_TOKENS = 24


@pytest.mark.compatibility("`vllm run-batch`, with `vllm_xargs`", "exact")
def test_each_line_has_the_policy_that_it_asks_for(four_layers_path: Path, tmp_path: Path) -> None:
    """Proves it for chats with the engine's window, one of 60 and full attention."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(four_layers_path)
    document = (FOLDER / "sierras.txt").read_text()[:3000]
    messages = [{"role": "user", "content": document}]
    asked = {"engine": {}, "small": {"sepllm_window": 60}, "full": {"sepllm": False}}
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": str(four_layers_path),
                "messages": messages,
                "temperature": 0.0,
                "max_tokens": MAX_TOKENS,
                "ignore_eos": True,
                "logprobs": True,
                "return_token_ids": True,
                "vllm_xargs": xargs,
            },
        }
        for name, xargs in asked.items()
    ]
    given, answered = tmp_path / "given.jsonl", tmp_path / "answered.jsonl"
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["vllm", "run-batch", "-i", str(given), "-o", str(answered)]
    command += ["--model", str(four_layers_path), "--attention-backend", "sepllm"]
    command += [
        "--additional-config",
        json.dumps({"sepllm": {"window": 124, "separators": "extended"}}),
    ]
    command += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]
    subprocess.run(command, env=child_environment(), check=True, timeout=300)

    separators = frozenset(token_separators("extended", tokenizer, len(tokenizer)).token_ids)
    rules = {"engine": Rule(4, 124, separators), "small": Rule(4, 60, separators), "full": None}
    answers = [json.loads(line) for line in answered.read_text().splitlines()]
    assert {answer["custom_id"] for answer in answers} == rules.keys()
    said = set()
    for answer in answers:
        body = answer["response"]["body"]
        tokens = body["choices"][0]["token_ids"]
        assert len(tokens) == MAX_TOKENS
        rule = rules[answer["custom_id"]]
        assert tokens == greedy(four_layers_path, body["prompt_token_ids"], tokens, rule)
        said.add(tuple(tokens))
    assert len(said) == len(rules)
