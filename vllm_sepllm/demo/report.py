"""Tables of the demonstration."""

from collections.abc import Callable

from rich.console import Group
from rich.table import Table

from vllm_sepllm.demo.offline import Result

# label, value, digits after the point
ROWS: tuple[tuple[str, Callable[[Result], float], int], ...] = (
    ("KV blocks of the largest request", lambda r: r.blocks_per_request, 0),
    ("KV MiB of the largest request", lambda r: r.mib_per_request, 1),
    ("requests that ran at once", lambda r: r.num_running, 0),
    ("requests that the pool can hold", lambda r: r.capacity, 0),
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
        table.add_row(label, f"{left:,.{digits}f}", f"{right:,.{digits}f}", f"{right / left:.2f}")
    return table


def _answers(stock: Result, sepllm: Result) -> Table:
    table = Table(
        title="Answers, greedy. A model of 135M parameters answers poorly with either cache",
        show_lines=True,
    )
    for name in ("document", "stock vLLM", "sepllm"):
        table.add_column(name)
    for title, answer in stock.answers.items():
        # the documents' line breaks come back in the answers; a table makes its own
        table.add_row(title, " ".join(answer.split()), " ".join(sepllm.answers[title].split()))
    return table
