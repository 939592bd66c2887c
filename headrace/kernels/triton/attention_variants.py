"""The configurations of attention that are compiled ahead of time: calls on arrays without memory, prepared like any.

Each case is a call as users make it, so that what is compiled here is what `run` would launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace.kernels.triton.attention_backward_call import backward_calls
from headrace.kernels.triton.attention_call import KernelCall, forward_call
from headrace.kernels.triton.attention_tiles import SUMMED_GRADIENTS
from headrace.kernels.triton.variants import CHIPS, Variant

OPTIONS = {"top_left": False, "window_left": -1, "window_right": 0, "scale": 0.1, "softcap": 0.0}
# Where nothing else is said, sizes of the call and addresses that are used before and behind the loops alone. With dQ:
# those of the loops over whole tiles and over others, read back between these; by its SASS the first reads back
# nothing (of ragged keys 3 of 551 instructions do), the other by 6 of 1238.
SPILLS = {"keys atomic": {"sm_90": 208}}
FEW_SPILLS = {"sm_80": 8, "sm_90": 48}
# The halves that tf32x3 makes of each query stay in registers; so do the sums of 512 values. By their SASS, loops over
# whole tiles read back: float32 of 128 by 12 of 1029 instructions (sm_100: 7 of 985), of 256 by 6 of 1049, 512 values
# nothing. With half the keys a tile they would read back 0 or 1, and take half as many instructions again.
LARGE = ("fp32 128", "fp32 256", "bf16 576 512")
SPILLS_OF_HALVES = {"sm_90": 144, "sm_100": 88}
REDUCES = "cp.reduce.async.bulk.tensor"
WGMMA = {"sm_90": ("wgmma.mma_async",)}
_SPELLED = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


def empty(*shape: int, dtype: Any = torch.bfloat16) -> torch.Tensor:
    """An array without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def dense_arrays(
    dim: int, value_dim: int = 0, dtype: Any = torch.bfloat16, stored: Any = None, tokens: int = 4096
) -> dict[str, Any]:
    """A dense call of 32 query heads and 8 KV heads. stored: the type of keys and values."""
    value_dim, halves = value_dim or dim, 2 if stored == torch.uint8 else 1
    arrays = {
        "query": empty(2, tokens, 32, dim, dtype=dtype),
        "key": empty(2, 4096, 8, dim // halves, dtype=stored or dtype),
        "value": empty(2, 4096, 8, value_dim // halves, dtype=stored or dtype),
        "out": empty(2, tokens, 32, value_dim, dtype=dtype),
        "lse": empty(2, tokens, 32, dtype=torch.float32),
    }
    if halves == 2:
        arrays |= {f"{name}_scales": empty(2, 4096, 8, dtype=torch.float32) for name in ("key", "value")}
    return arrays


def ragged_arrays(dim: int, dtype: Any = torch.bfloat16) -> dict[str, Any]:
    """The same with tokens of 8 requests one after the other."""
    arrays = {name: array[0] for name, array in dense_arrays(dim, dtype=dtype).items()}
    starts = {"query_starts": empty(9, dtype=torch.int32)}
    return arrays | starts | {name: empty(8, dtype=torch.int32) for name in ("key_starts", "key_lens")}


def variant_of(name: str, kernel: Any, call: KernelCall, chip: str, promises: Mapping[str, Any]) -> Variant:
    """The variant that a prepared call launches on a chip."""
    types: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for argument, value in call.arguments.items():
        if isinstance(value, torch.Tensor):
            types[argument] = _SPELLED[value.dtype]
        elif isinstance(value, TensorDescriptor):
            types[argument] = f"tensordesc<fp32{value.block_shape}>"
        elif isinstance(value, tuple):
            types[argument] = ("i32",) * len(value)
        elif isinstance(value, (int, float)):
            types[argument] = "i32" if isinstance(value, int) else "fp32"
        else:
            constants[argument] = value
    aligned = tuple(argument for argument in types if argument.endswith("_strides"))
    return Variant(
        name, kernel, types, constants, call.num_warps, call.num_stages, (chip,), aligned, instructions=promises
    )


def forward_variants(kernel: Any) -> list[Variant]:
    found = []
    for name, (arrays, options, chips, promises) in _forward_cases().items():
        for chip in chips:
            call = forward_call(arrays, OPTIONS | options, chip)
            made = variant_of(name, kernel, call, chip, promises)
            found.append(replace(made, spills=SPILLS_OF_HALVES if name in LARGE else FEW_SPILLS))
    return found


def _forward_cases() -> dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...], Mapping[str, Any]]]:
    every, hopper, both = tuple(CHIPS), ("sm_90",), ("sm_80", "sm_90")
    full = dense_arrays(128)
    vectors = {"sinks": empty(32, dtype=torch.float32), "alibi_slopes": empty(1, 32, dtype=torch.float32)}
    options = {"window_left": 1000, "softcap": 30.0}
    bits = {"mask": empty(2, 1, 4096, 4096, dtype=torch.bool)}
    floats = {"mask": empty(2, 1, 4096, 4096, dtype=torch.float16)}
    return {
        "bf16 64": (dense_arrays(64), {}, every, WGMMA),
        "bf16 128": (full, {}, every, WGMMA),
        "bf16 256": (dense_arrays(256), {}, every, WGMMA),
        "bf16 192 128": (dense_arrays(192, 128), {}, hopper, WGMMA),
        "bf16 576 512": (dense_arrays(576, 512), {}, (*both, "gfx942"), {}),
        "bf16 128 ragged": (ragged_arrays(128), {}, hopper, WGMMA),
        "bf16 128 mask": (full | bits, {"window_right": -1}, ("sm_90", "gfx942"), WGMMA),
        "bf16 128 all options": (full | vectors | floats, options, both, WGMMA),
        "bf16 128 exact": (full, {"precision": "exact"}, hopper, {}),
        "bf16 128 decode": (dense_arrays(128, tokens=1), {}, every, {}),
        "fp32 128": (dense_arrays(128, dtype=torch.float32), {}, every, {}),
        "fp32 256": (dense_arrays(256, dtype=torch.float32), {}, hopper, {}),
        "fp32 128 decode": (dense_arrays(128, dtype=torch.float32, tokens=1), {}, both, {}),
        "float8 128": (dense_arrays(128, stored=torch.float8_e4m3fn), {}, both, WGMMA),
        "int4 128": (dense_arrays(128, stored=torch.uint8), {}, hopper, WGMMA),
    }


def backward_variants(kernels: Mapping[str, Any]) -> list[Variant]:
    found = []
    for name, (arrays, options, chips, promises) in _backward_cases().items():
        for atomic, chip in itertools.product((False, True), chips):
            if atomic and chip not in SUMMED_GRADIENTS:
                continue
            for kernel, call in backward_calls(with_gradients(arrays), OPTIONS | options, chip, atomic=atomic):
                launched = _LAUNCHED[atomic].get(kernel)
                if launched and (kernel in _WALKS or name == "bf16 128"):
                    promised = promised_of(launched, promises)
                    made = variant_of(f"{name} {launched}", kernels[kernel], call, chip, promised)
                    found.append(replace(made, spills=SPILLS.get(launched, FEW_SPILLS)))
    return found


# By whether queries' gradients are added up in memory: the kernels that differ, and their names.
_LAUNCHED = {
    False: {"rows": "rows", "keys": "keys", "queries": "queries"},
    True: {"keys": "keys atomic", "round": "round"},
}
_WALKS = ("keys", "queries")


def promised_of(launched: str, promises: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the assembly of a backward's kernel holds: those that only look at rows multiply nothing."""
    if launched == "keys atomic":
        return {chip: (*promises.get(chip, ()), REDUCES) for chip in SUMMED_GRADIENTS}
    return promises if launched in _WALKS else {}


def with_gradients(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A call with all that its gradients take."""
    gradients = {"d_out": "out", "d_query": "query", "d_key": "key", "d_value": "value"}
    return {**arrays, **{name: torch.empty_like(arrays[of]) for name, of in gradients.items()}}


def _backward_cases() -> dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...], Mapping[str, Any]]]:
    every, hopper, both = tuple(CHIPS), ("sm_90",), ("sm_80", "sm_90")
    vectors = {"alibi_slopes": empty(1, 32, dtype=torch.float32), "mask": empty(2, 1, 4096, 4096, dtype=torch.bool)}
    return {
        "bf16 64": (dense_arrays(64), {}, both, WGMMA),
        "bf16 128": (dense_arrays(128), {}, every, WGMMA),
        "bf16 256": (dense_arrays(256), {}, both, {}),
        "bf16 128 ragged": (ragged_arrays(128), {}, hopper, WGMMA),
        "bf16 128 all options": (dense_arrays(128) | vectors, {"window_left": 1000, "softcap": 30.0}, hopper, WGMMA),
        "fp32 128": (dense_arrays(128, dtype=torch.float32), {}, both, {}),
    }
