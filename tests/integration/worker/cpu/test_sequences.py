"""A chunk's attention by vLLM's CPU kernel over sequences, against the dense mask."""

from itertools import product

import pytest
import torch
from vllm.platforms import current_platform

from tests.support.chunks import make_chunk, positions_of
from vllm_sepllm.integration.worker.cpu.sequences import SequenceKernel, padded_kernel
from vllm_sepllm.ops import reference
from vllm_sepllm.policy.keys.sequences import tile_sequences
from vllm_sepllm.policy.visibility import Policy, visible_mask

# bfloat16 keeps 8 bits of values of size 1, of weights and of the result
TOLERANCE = {"vec": 2e-5, "vec16": 2e-5, "amx": 3e-2}


def run(
    kernel: SequenceKernel,
    policy: Policy,
    num_tokens: int,
    start: int,
    head_size: int,
    seed: int,
) -> float:
    """Largest error of the queries from ``start`` on."""
    gen = torch.Generator().manual_seed(seed)
    flags = torch.rand(num_tokens, generator=gen) < 0.2
    chunk = make_chunk(policy, flags.tolist(), start)
    sizes = [(num_tokens, n, head_size) for n in (kernel.num_heads, *(kernel.num_kv_heads,) * 2)]
    query, key, value = (torch.randn(size, generator=gen).to(kernel.dtype) for size in sizes)
    sinks = torch.randn(kernel.num_heads, generator=gen)
    cached = None
    if start:
        held = positions_of(chunk, flags.tolist())
        # what left the ring without a trace is never read
        at = [held.get(number, -1) for number in range(chunk.num_cached)]
        rows = torch.cat([key, value], 2)[at]
        rows[[p < 0 for p in at]] = float("nan")
        cached = rows.transpose(0, 1)
    plan = kernel.plan(tile_sequences(chunk, 32, kernel.block_size))
    out = torch.full_like(query[start:], float("nan"))
    new = (tensor[start:] for tensor in (query, key, value))
    plan.attend(*new, cached, 0.2, sinks, out)
    mask = torch.from_numpy(visible_mask(policy, flags.numpy())[start:])
    exact = (tensor.double() for tensor in (query[start:], key, value))
    wanted = reference.attend(*exact, mask, 0.2, sinks=sinks.double())
    return float((out.double() - wanted).abs().max())


@pytest.mark.parametrize(
    ("isa", "head_size"),
    [*product(("vec", "amx"), (32, 64, 96, 128)), ("vec16", 80), ("vec16", 112)],
)
def test_the_dense_mask(isa: str, head_size: int) -> None:
    """Chunks of odd lengths one after the other, in buffers that keep what the last one left."""
    if isa == "amx" and not (torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()):
        pytest.skip("this processor has no AMX")
    current_platform.import_kernels()
    dtype = torch.bfloat16 if isa == "amx" else torch.float32
    kernel = SequenceKernel.of(6, 2, head_size, isa, dtype)
    assert kernel is not None
    chunks = [(300, 0), (331, 150), (200, 199), (97, 30)]
    for bound, (seed, sizes) in product((None, 13, 1), enumerate(chunks)):
        assert run(kernel, Policy(4, 70, bound), *sizes, head_size, seed) < TOLERANCE[isa]


def test_kernels_of_heads() -> None:
    assert padded_kernel(64, "amx") == (96, "amx")
    assert padded_kernel(64, "vec") == (80, "vec16")
    assert padded_kernel(80, "vec16") == (96, "vec")
    assert padded_kernel(128, "vec") == (160, "vec")
    assert padded_kernel(256, "vec") is None
    assert padded_kernel(64, "neon") is None
