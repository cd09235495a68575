"""No 16-bit arithmetic under Triton's interpreter, which computes bfloat16 wrongly in silence."""

import pytest
import torch
import triton
import triton.language as tl

from tests.support.kernel_cases import Shape, make_case, prompt
from vllm_sepllm import ops
from vllm_sepllm.policy.visibility import Policy

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
ARITHMETIC = ("binary_op", "unary_op", "ternary_op", "create_dot", "create_fma")
NARROW = (tl.bfloat16, tl.float16, tl.float8e4nv, tl.float8e5)


@pytest.fixture
def narrow_operands(monkeypatch) -> list[str]:
    """Names of the arithmetic operations that met an operand of 16 bits or less."""
    met: list[str] = []
    builder = interpreter.InterpreterBuilder

    def watch(name):
        original = getattr(builder, name)

        def wrapper(self, *operands):
            for operand in operands:
                if isinstance(operand, interpreter.TensorHandle):
                    dtype = operand.dtype.scalar
                    if dtype in NARROW:
                        met.append(f"{name} of {dtype}")
            return original(self, *operands)

        monkeypatch.setattr(builder, name, wrapper)

    for name in ARITHMETIC:
        watch(name)
    return met


@triton.jit
def _double_bfloat16(x_ptr):
    x = tl.load(x_ptr)
    tl.store(x_ptr, x + x)


def test_the_watch_sees_bfloat16_arithmetic(narrow_operands) -> None:
    _double_bfloat16[(1,)](torch.ones(1, dtype=torch.bfloat16))
    assert narrow_operands


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_prefill_computes_in_float32(narrow_operands, dtype, cache_dtype) -> None:
    shape = Shape(dtype=dtype, cache_dtype=cache_dtype, head_size=32)
    case = make_case(Policy(3, 8, 4), [prompt(40, 20)], shape)
    sinks = torch.zeros(2, dtype=dtype)
    out = case.run(torch.float32, soft_cap=4.0, sinks=sinks)
    assert not narrow_operands
    oracle = case.dense(torch.float64, soft_cap=4.0, sinks=sinks)
    # the error of float32, not that of the inputs' dtype (bfloat16: about 1e-2)
    assert (out - oracle).abs().max() <= 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_turn_in_float32(narrow_operands, dtype) -> None:
    cache = torch.ones(1, 1, 2, 8, dtype=dtype)
    turns = ops.KeyRotation(torch.zeros(9, 4), torch.ones(9, 4), is_neox_style=True)
    ids = torch.arange(2)
    ops.turn(ops.CacheTable.build([cache]), turns, ids, ids - 1)
    assert not narrow_operands
    assert cache[0, 0].tolist() == [[1.0] * 4 + [-1.0] * 4, [-1.0] * 4 + [1.0] * 4]
