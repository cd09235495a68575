"""The kernel variants that :mod:`vllm_sepllm.bench.compile` compiles, as Triton takes them."""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

from vllm_sepllm.bench.gpus import Target
from vllm_sepllm.kernels.keys import keys_kernel
from vllm_sepllm.kernels.prefill import prefill_kernel
from vllm_sepllm.kernels.slots import slots_kernel
from vllm_sepllm.kernels.spill import spill_kernel
from vllm_sepllm.kernels.tuning import Tuning, tuning_for
from vllm_sepllm.kernels.turn import turn_kernel

GROUP = 4  # query heads a KV head of the compiled variants: Llama 3 8B


@dataclass(frozen=True, slots=True)
class Variant:
    """Arguments that select one compilation of a kernel.

    Attributes:
        kernel: "prefill", "spill", "turn", "slots" or "keys".
        name: what the table calls it.
        head_size: of the prefill kernel; elements a row of the spill kernel, rotated ones of a head
            of the turn kernel.
        dtype: Triton's name of the query's type; the unit that spill copies; of keys that turn.
        has_fp8_cache: prefill from an fp8 cache.
        has_extras: prefill with soft cap and attention sinks.
        is_neox_style: of the turn kernel.
    """

    kernel: str
    name: str
    head_size: int
    dtype: str
    has_fp8_cache: bool = False
    has_extras: bool = False
    is_neox_style: bool = True


_FLOATS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
_EVERYTHING = {"has_fp8_cache": True, "has_extras": True}
VARIANTS = (
    *(Variant("prefill", f"bf16 head {size}", size, "bf16") for size in (64, 80, 128, 256)),
    Variant("prefill", "fp16 head 128", 128, "fp16"),
    Variant("prefill", "bf16 head 128, fp8 cache", 128, "bf16", has_fp8_cache=True),
    Variant("prefill", "bf16 head 128, soft cap, sinks", 128, "bf16", has_extras=True),
    *(
        Variant(
            "prefill", f"bf16 head {size}, fp8 cache, soft cap, sinks", size, "bf16", **_EVERYTHING
        )
        for size in (64, 128, 256)
    ),
    *(Variant("prefill", f"fp32 head {size}", size, "fp32") for size in (128, 256)),
    Variant("spill", "8-byte units, row 64", 64, "i64"),
    Variant("spill", "2-byte units, row 96", 96, "i16"),
    *(Variant("turn", f"turn bf16 head {size}", size, "bf16") for size in (64, 128, 256)),
    Variant("turn", "turn fp32 head 128", 128, "fp32"),
    Variant("turn", "turn bf16 head 128, neighbours", 128, "bf16", is_neox_style=False),
    Variant("slots", "blocks of 16", 1, "i64"),
    Variant("keys", "lists, blocks of 16", 1, "i32"),
)


def source_of(variant: Variant, target: Target) -> tuple[ASTSource, Tuning]:
    """What Triton compiles for one variant, and the launch it is compiled for.

    Raises:
        RuntimeError: under TRITON_INTERPRET, where nothing is compiled.
    """
    if not isinstance(prefill_kernel, triton.runtime.JITFunction):
        raise RuntimeError("kernels are interpreted, not compiled: unset TRITON_INTERPRET")
    if variant.kernel == "prefill":
        element_bytes = 4 if variant.dtype == "fp32" else 2
        tuning = tuning_for(variant.head_size, element_bytes, GROUP, target.family)
        return _prefill_source(variant, target, tuning), tuning
    sources = {
        "spill": _spill_source,
        "turn": _turn_source,
        "slots": _slots_source,
        "keys": _keys_source,
    }
    return sources[variant.kernel](variant), Tuning(1, 1, 4, 1)


def _source(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    """Every pointer and stride a multiple of 16, as vLLM's tensors are."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [
        index
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (name.startswith("stride_") and name in types)
    ]
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )


def _prefill_source(variant: Variant, target: Target, tuning: Tuning) -> ASTSource:
    cache = target.fp8 if variant.has_fp8_cache else variant.dtype
    assert cache is not None, "the target has no such cache: Target.compiles"
    types = {f"{name}_ptr": f"*{variant.dtype}" for name in ("query", "key", "value", "out")}
    types |= {f"{name}_cache_ptr": f"*{cache}" for name in ("key", "value")}
    tables = ("tiles", "place", "until")
    types |= {f"{name}_ptr": "*i32" for name in tables}
    strides = ("query", "key", "value", "out", "block", "head", "token")
    types |= {f"stride_{name}": "i32" for name in strides} | {"scale": "fp32"}
    constants: dict[str, Any] = {"stride_row": 1}
    for name, dtype, is_used in (
        ("soft_cap", "fp32", variant.has_extras),
        ("sinks_ptr", "*fp32", variant.has_extras),
        ("key_scale_ptr", "*fp32", variant.has_fp8_cache),
        ("value_scale_ptr", "*fp32", variant.has_fp8_cache),
    ):
        if is_used:
            types[name] = dtype
        else:
            constants[name] = None
    constants |= {
        "GROUP": GROUP,
        "HEAD": variant.head_size,
        "HEAD_POW2": triton.next_power_of_2(variant.head_size),
        "BLOCK_SIZE": 16,
        "BLOCK_ROWS": tuning.block_rows,
        "BLOCK_KEYS": tuning.block_keys,
        "DOT_DTYPE": _FLOATS[variant.dtype],
    }
    return _source(prefill_kernel, types, constants)


def _spill_source(variant: Variant) -> ASTSource:
    types = {"cache_ptrs": "*i64", "src_ptr": "*i64", "dst_ptr": "*i64", "num_heads": "i32"}
    types |= {f"stride_{name}": "i32" for name in ("block", "head", "token")}
    constants = {
        "stride_row": 1,
        "BLOCK_SIZE": 16,
        "ROW": variant.head_size,
        "ROW_POW2": triton.next_power_of_2(variant.head_size),
        "BLOCK_HEADS": 8,
        "UNIT": {"i64": tl.int64, "i16": tl.int16}[variant.dtype],
    }
    return _source(spill_kernel, types, constants)


def _turn_source(variant: Variant) -> ASTSource:
    """8 KV heads in a program, as many as there are in most models."""
    types = {"cache_ptrs": "*i64", "slots_ptr": "*i64", "delta_ptr": "*i64", "num_heads": "i32"}
    types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    types |= {f"stride_{name}": "i32" for name in ("block", "head", "token")}
    num_pairs = variant.head_size // 2
    constants = {
        "stride_row": 1,
        "BLOCK_SIZE": 16,
        "NUM_PAIRS": num_pairs,
        "PAIRS_POW2": triton.next_power_of_2(num_pairs),
        "BLOCK_HEADS": 8,
        "IS_NEOX": variant.is_neox_style,
        "DTYPE": _FLOATS[variant.dtype],
    }
    return _source(turn_kernel, types, constants)


def _slots_source(_: Variant) -> ASTSource:
    types = {"entries_ptr": "*i64", "block_table_ptr": "*i32", "out_ptr": "*i64"}
    types |= {"num_entries": "i32", "stride_table": "i32"}
    return _source(slots_kernel, types, {"BLOCK_SIZE": 16, "BLOCK": 256})


def _keys_source(_: Variant) -> ASTSource:
    tables = ("requests", "separators", "until", "block_table", "place_out", "until_out")
    types = {f"{name}_ptr": "*i32" for name in tables} | {"stride_table": "i32"}
    constants = {"MAX_SEPARATORS": 2**30, "BLOCK_SIZE": 16, "BLOCK": 256}
    return _source(keys_kernel, types, constants)
