"""Tables of the demonstration."""

from collections.abc import Callable

from rich.console import Group
from rich.table import Table

from vllm_sepllm.demo.corpus import QUESTIONS
from vllm_sepllm.demo.offline import Result

# label, value, digits after the point
ROWS: tuple[tuple[str, Callable[[Result], float], int], ...] = (
    ("KV blocks of the largest request", lambda r: r.blocks_per_request, 0),
    ("KV MiB of the largest request", lambda r: r.mib_per_request, 1),
    ("requests that ran at once", lambda r: r.num_running, 0),
    ("requests that the pool can hold", lambda r: r.capacity, 0),
    ("answers in the text's own words", lambda r: r.num_right, 0),
    ("wall time, s", lambda r: r.seconds, 1),
    ("prompt tokens/s", lambda r: r.num_prompt_tokens / r.seconds, 0),
    ("answer tokens/s", lambda r: r.num_answer_tokens / r.seconds, 1),
)


def comparison(stock: Result, sepllm: Result) -> Group:
    """What each backend needed and reached, and what each answered, side by side."""
    return Group(_numbers(stock, sepllm), "", _answers(stock, sepllm))


def _numbers(stock: Result, sepllm: Result) -> Table:
    mib = stock.num_blocks * stock.block_bytes / 2**20
    table = Table(
        title=f"{len(stock.answers)} documents, {stock.num_prompt_tokens:,} prompt tokens; "
        f"a KV cache of {stock.num_blocks} blocks, {mib:.0f} MiB, for each"
    )
    table.add_column("")
    for name in ("stock vLLM", "sepllm", "sepllm / stock"):
        table.add_column(name, justify="right")
    for label, value, digits in ROWS:
        left, right = value(stock), value(sepllm)
        ratio = f"{right / left:.2f}" if left else ""
        table.add_row(label, f"{left:,.{digits}f}", f"{right:,.{digits}f}", ratio)
    return table


def _answers(stock: Result, sepllm: Result) -> Table:
    table = Table(
        title="Answers, greedy. Of what was told more than 508 tokens ago, sepllm keeps the "
        "ends of sentences",
        show_lines=True,
    )
    for name in ("document and question", "told", "tokens ago", "stock vLLM", "sepllm"):
        table.add_column(name)
    # what is in the window first
    for title, distance in sorted(stock.distances.items(), key=lambda item: item[1]):
        question = QUESTIONS[title]
        # line breaks come back in the answers; a table makes its own
        answers = (" ".join(side.answers[title].split()) for side in (stock, sepllm))
        table.add_row(f"{title}: {question.text}", question.told, f"{distance:,}", *answers)
    return table
