"""The table says what was measured."""

import re
from dataclasses import replace

from rich.console import Console

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.demo.offline import Result
from vllm_sepllm.demo.report import comparison

STOCK = Result(
    answers={"revere": "a stock\nhorse-box", "sierras": "none"},
    distances={"revere": 20, "sierras": 6000},
    num_prompt_tokens=8000,
    num_answer_tokens=60,
    seconds=20.0,
    num_running=2,
    num_blocks=101,
    blocks_per_request=50,
    block_bytes=2**20,
)
SEPLLM = replace(
    STOCK,
    answers={"revere": "another", "sierras": "ours"},
    seconds=10.0,
    num_running=10,
    blocks_per_request=10,
)


def test_capacity_leaves_out_vllms_own_block() -> None:
    assert STOCK.capacity == 2
    assert replace(STOCK, num_blocks=100).capacity == 1


def test_table_shows_both_sides_and_their_ratio() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(comparison(STOCK, SEPLLM))
    lines = [" ".join(line.replace("│", " ").split()) for line in capture.get().splitlines()]
    assert "KV blocks of the largest request 50 10 0.20" in lines
    assert "KV MiB of the largest request 50.0 10.0 0.20" in lines
    assert "requests that ran at once 2 10 5.00" in lines
    assert "requests that the pool can hold 2 10 5.00" in lines
    assert "wall time, s 20.0 10.0 0.50" in lines
    assert "prompt tokens/s 400 800 2.00" in lines
    assert "answer tokens/s 3.0 6.0 2.00" in lines
    assert "answers in the text's own words 1 0 0.00" in lines
    words = " ".join(lines)
    # the demo serves the default
    assert f"told more than {SepLLMConfig().window} tokens ago" in words
    assert re.search(r"horse-box 20 a stock (.* )?another", words)
    assert words.index("horse-box 20") < words.index("6,000")
