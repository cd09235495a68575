"""A model of what prefill and decode cost, full attention against SepLLM. Not a measurement.

Run: ``python -m vllm_sepllm.bench.roofline --gpu h100 [--json] [--density 0.05] [--batch 32] ...``

The bound is the larger of FLOPs / peak and bytes / bandwidth with published peak figures: no kernel
reaches it, and the two kinds of attention may miss it by different factors. Bytes are the least
that must move: weights once a step, KV written once, and the KV of the cache once a step.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from vllm_sepllm.bench.gpus import GPUS, Gpu
from vllm_sepllm.policy.visibility import Policy

LABEL = "model, not a measurement"
CONTEXTS = (8192, 32768, 131072)
BATCHES = (1, 8, 32, 128)
BYTES = 2  # bf16 weights and KV
CHUNK = 8192  # tokens a prefill step, vLLM's max_num_batched_tokens on large GPUs
ROWS = 128  # rows of a query tile: tokens times query heads a KV head
USABLE_MEMORY = 0.9  # vLLM's default gpu_memory_utilization


@dataclass(frozen=True, slots=True)
class Transformer:
    """Sizes of a dense decoder with gated MLP and untied embeddings, from its config.json."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices."""
        attention = self.hidden_size * self.head_size * 2 * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        """Weights of the output matrix; the embedding has as many."""
        return self.hidden_size * self.vocab_size

    @property
    def kv_bytes(self) -> int:
        """KV bytes a token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * BYTES

    @property
    def flops_per_pair(self) -> int:
        """FLOPs of one query token reading one key, all layers and heads."""
        return 4 * self.num_layers * self.num_heads * self.head_size


# sepllm's defaults, and the ends of sentences among the tokens of English text
POLICY, DENSITY = Policy(initial_tokens=4, window=508, max_separators=256), 0.05
LLAMA_3_8B = Transformer("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256)
MODELS = (
    LLAMA_3_8B,
    Transformer("Qwen3-32B", 64, 5120, 64, 8, 128, 25600, 151936),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """One row: a prompt's prefill, or one decode step of a batch.

    Attributes:
        kind: always LABEL.
        keys: keys that the last query reads (they are what the cache holds).
        flops: of everything.
        attention_flops: of attention, key tiles counted whole.
        bytes_moved: least memory traffic.
        bound_ms: roofline bound; no kernel reaches it.
        limited_by: "compute" or "memory".
        fits: weights and the batch's KV fit the usable memory.
    """

    kind: str
    model: str
    gpu: str
    num_gpus: int
    phase: str
    attention: str
    context: int
    batch: int
    keys: int
    flops: float
    attention_flops: float
    bytes_moved: float
    bound_ms: float
    limited_by: str
    fits: bool


def num_keys(position: int, policy: Policy | None, density: float) -> float:
    """Keys that the query at a position reads; None is full attention.

    Args:
        position: of the query.
        policy: a, n and s.
        density: share of separators among the tokens that left the window.
    """
    if policy is None:
        return position + 1
    far = max(0, position + 1 - policy.num_dense) * density
    far = min(far, policy.bound)
    return min(position + 1, policy.num_dense) + far


def prefill_pairs(context: int, policy: Policy | None, density: float, tile_tokens: int) -> float:
    """(query, key) pairs of a prompt: a tile computes all its keys for all its queries."""
    pairs = 0.0
    for first in range(0, context, tile_tokens):
        last = min(first + tile_tokens, context) - 1
        # the first query's window and the last query's keys: the tile touches both
        touched = min(num_keys(first, policy, density) + last - first, last + 1)
        pairs += touched * (last - first + 1)
    return pairs


def prefill_cost(
    model: Transformer, gpu: Gpu, num_gpus: int, context: int, policy: Policy | None, density: float
) -> Cost:
    """Prefill of one prompt in chunks; logits of the last token alone."""
    tile_tokens = ROWS // (model.num_heads // model.num_kv_heads)
    pairs = prefill_pairs(context, policy, density, tile_tokens)
    attention = pairs * model.flops_per_pair
    flops = 2.0 * model.layer_weights * context + 2.0 * model.head_weights + attention
    starts = range(0, context, CHUNK)
    held = [num_keys(start - 1, policy, density) if start else 0.0 for start in starts]
    keys = num_keys(context - 1, policy, density)
    written = context if policy is None else keys
    weights = (model.layer_weights * len(starts) + model.head_weights) * BYTES
    moved = weights + (sum(held) + written) * model.kv_bytes
    sizes = (context, 1, keys)
    return _cost(model, gpu, num_gpus, "prefill", policy, sizes, (flops, attention, moved))


def decode_cost(
    model: Transformer,
    gpu: Gpu,
    num_gpus: int,
    context: int,
    batch: int,
    policy: Policy | None,
    density: float,
) -> Cost:
    """One step that adds a token to each of ``batch`` requests of ``context`` tokens."""
    keys = num_keys(context - 1, policy, density)
    attention = batch * keys * model.flops_per_pair
    weights = model.layer_weights + model.head_weights
    flops = 2.0 * weights * batch + attention
    moved = weights * BYTES + batch * keys * model.kv_bytes
    sizes = (context, batch, keys)
    return _cost(model, gpu, num_gpus, "decode", policy, sizes, (flops, attention, moved))


def _cost(
    model: Transformer,
    gpu: Gpu,
    num_gpus: int,
    phase: str,
    policy: Policy | None,
    sizes: tuple[int, int, float],
    work: tuple[float, float, float],
) -> Cost:
    """Bound of some work: ``sizes`` are context, batch and keys; ``work`` as in :class:`Cost`."""
    (context, batch, keys), (flops, attention, moved) = sizes, work
    compute = flops / (gpu.flops * num_gpus)
    memory = moved / (gpu.bandwidth * num_gpus)
    weights = (model.layer_weights + 2 * model.head_weights) * BYTES
    needed = weights + batch * keys * model.kv_bytes
    return Cost(
        kind=LABEL,
        model=model.name,
        gpu=gpu.name,
        num_gpus=num_gpus,
        phase=phase,
        attention="full" if policy is None else "sepllm",
        context=context,
        batch=batch,
        keys=round(keys),
        flops=flops,
        attention_flops=attention,
        bytes_moved=moved,
        bound_ms=max(compute, memory) * 1e3,
        limited_by="compute" if compute > memory else "memory",
        fits=needed <= USABLE_MEMORY * gpu.memory * num_gpus,
    )


def costs(
    gpu: Gpu, num_gpus: int, policy: Policy, density: float, batches: tuple[int, ...]
) -> Iterator[Cost]:
    """Every model, context, phase and batch, full attention before SepLLM."""
    for model in MODELS:
        for context in CONTEXTS:
            for kind in (None, policy):
                yield prefill_cost(model, gpu, num_gpus, context, kind, density)
            for batch in batches:
                for kind in (None, policy):
                    yield decode_cost(model, gpu, num_gpus, context, batch, kind, density)


def render(rows: list[Cost], policy: Policy, density: float) -> Table:
    """The table for a terminal; every line says that it is a model."""
    table = Table(
        title=f"{rows[0].num_gpus} x {rows[0].gpu}: {LABEL}",
        caption=f"{LABEL}: {policy}, {density:.0%} separators, bf16, peak figures",
    )
    for column in ("kind", "model", "phase", "attention"):
        table.add_column(column)
    for column in ("context", "batch", "keys", "TFLOP", "GB", "bound ms", "limited by", "fits"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = (f"{row.flops / 1e12:.2f}", f"{row.bytes_moved / 1e9:.1f}", f"{row.bound_ms:.2f}")
        sizes = (str(row.context), str(row.batch), str(row.keys))
        end = (row.limited_by, "yes" if row.fits else "no")
        table.add_row("modelled", row.model, row.phase, row.attention, *sizes, *numbers, *end)
    return table


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    parser.add_argument("--num-gpus", type=int, default=1, help="work split evenly, no traffic")
    parser.add_argument("--batch", type=int, action="append", help=f"default: {BATCHES}")
    parser.add_argument("--initial-tokens", type=int, default=POLICY.initial_tokens)
    parser.add_argument("--window", type=int, default=POLICY.window)
    parser.add_argument("--max-separators", type=int, default=POLICY.max_separators)
    parser.add_argument(
        "--density", type=float, default=DENSITY, help="separators among far tokens"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line a row")
    args = parser.parse_args()
    policy = Policy(args.initial_tokens, args.window, args.max_separators)
    batches = tuple(args.batch or BATCHES)
    rows = list(costs(GPUS[args.gpu], args.num_gpus, policy, args.density, batches))
    if args.json:
        for row in rows:
            print(json.dumps(asdict(row)))
        return
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(render(rows, policy, args.density))


if __name__ == "__main__":
    main()
