"""Ask a running server about a long file, and print the answer as it comes.

Run: ``python examples/ask.py FILE QUESTION [URL]``; see serve.sh for the server.
"""

import sys
from pathlib import Path

from openai import OpenAI


def main(file: str, question: str, url: str = "http://127.0.0.1:8000/v1") -> None:
    """Stream one answer of the server's model to standard output."""
    client = OpenAI(base_url=url, api_key="unused")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{Path(file).read_text('utf-8')}\n\n{question}"}],
        temperature=0.0,
        max_tokens=64,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
