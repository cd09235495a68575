"""A text without an end: read a file to a server piece by piece, and ask a question after each.

Run: ``python examples/stream.py FILE QUESTION [TOKENS]``, TOKENS of a piece (10,000), and
SEPLLM_URL=http://host:port/v1 for another server than this machine's; for the server
``examples/serve.sh MODEL --max-model-len 1000000 --additional-config
'{"sepllm": {"positions": "renumbered", "max_separators": 256}}'``.
"""

import json
import os
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

from openai import OpenAI


def token_ids(url: str, model: str, text: str, *, is_start: bool = False) -> list[int]:
    """The server's tokens of a text."""
    given = {"model": model, "prompt": text, "add_special_tokens": is_start}
    request = Request(
        url.removesuffix("/v1") + "/tokenize",
        json.dumps(given).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request) as answer:
        return json.load(answer)["tokens"]


def main(file: str, question: str, num_tokens: int, url: str) -> None:
    """A line for each piece: what was read so far, how fast the piece was, and the answer.

    Every request brings the whole text; the prefix cache has all of it but the last piece, in as
    much memory after the last as after the first.
    """
    client = OpenAI(base_url=url, api_key="unused")
    model = client.models.list().data[0].id
    asked = token_ids(url, model, f"\n\nQuestion: {question}\nAnswer:")
    whole = token_ids(url, model, Path(file).read_text("utf-8"), is_start=True)
    for first in range(0, len(whole), num_tokens):
        text = whole[: first + num_tokens]
        start = time.perf_counter()
        # read before it is asked, so that the state behind the piece is what is cached
        client.completions.create(model=model, prompt=text, max_tokens=1)
        seconds = time.perf_counter() - start
        made = client.completions.create(
            model=model, prompt=text + asked, max_tokens=32, temperature=0.0
        )
        speed = (len(text) - first) / seconds
        print(f"{len(text):,} tokens, {speed:,.0f}/s: {made.choices[0].text.strip()!r}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    number = int(sys.argv[3]) if len(sys.argv) == 4 else 10_000
    main(*sys.argv[1:3], number, os.environ.get("SEPLLM_URL", "http://127.0.0.1:8000/v1"))
