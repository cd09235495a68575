"""An agent with tools that it does not forget: their schemas are the system prompt, protected.

Run: ``python examples/agent.py QUESTION [QUESTION ...]``, and SEPLLM_URL=http://host:port/v1 for
another server than this machine's; for the server
``examples/serve.sh MODEL --additional-config '{"sepllm": {"protect": "<|im_end|>"}}'``.
"""

import json
import os
import sys
from typing import Any

from openai import OpenAI

CITIES = {"Lisbon": ("sunny, 24 degrees", 0), "Osaka": ("rain, 17 degrees", 9)}
TOOLS = {
    "weather": ("The weather of a city now.", lambda city: CITIES[city][0]),
    "utc_offset": ("Hours that a city's clocks are ahead of UTC.", lambda city: CITIES[city][1]),
}
CITY = {"type": "string", "enum": list(CITIES)}
ARGUMENTS = {
    "type": "object",
    "properties": {"city": CITY},
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMAS = [
    {"name": name, "description": text, "parameters": ARGUMENTS}
    for name, (text, _) in TOOLS.items()
]
SYSTEM = (
    "You answer questions with tools. Call one with a line of JSON, its name and its arguments. "
    "Then you are told what it found, and answer in one sentence. The tools are:\n"
) + "\n".join(map(json.dumps, SCHEMAS))
# what vLLM lets the model write when it calls a tool
CALL = {
    "type": "object",
    "properties": {"name": {"enum": list(TOOLS)}, "arguments": ARGUMENTS},
    "required": ["name", "arguments"],
    "additionalProperties": False,
}


def main(questions: list[str], url: str) -> None:
    """One chat for all questions: for each of them a call of a tool, and an answer."""
    client = OpenAI(base_url=url, api_key="unused")
    model = client.models.list().data[0].id
    chat = [{"role": "system", "content": SYSTEM}]

    def say(text: str, **options: Any) -> str:
        """The model's turn behind what it is told."""
        chat.append({"role": "user", "content": text})
        made = client.chat.completions.create(
            model=model, messages=chat, temperature=0.0, max_tokens=64, **options
        )
        answer = made.choices[0].message.content
        chat.append({"role": "assistant", "content": answer})
        return answer

    wanted = {"type": "json_schema", "json_schema": {"name": "call", "schema": CALL}}
    for question in questions:
        call = json.loads(say(question, response_format=wanted))
        found = TOOLS[call["name"]][1](**call["arguments"])
        print(f"call: {call['name']}({call['arguments']['city']})")
        answer = say(f"The tool found: {found}. Answer in one sentence.")
        print(f"answer: {answer.strip()}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:], os.environ.get("SEPLLM_URL", "http://127.0.0.1:8000/v1"))
