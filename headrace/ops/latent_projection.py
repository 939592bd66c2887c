"""Latent attention's two forms, and the way from one to the other.

    c_j [latent]: the latent of token j       r_j [rope]: its rotated key, the same for all heads
    key_up U [heads, nope, latent]            value_up W [heads, value_dim, latent]

    un-absorbed:  k_jh = (U_h c_j, r_j)       v_jh = W_h c_j          o_h = softmax_j(scale * (q_h, p_h) k_jh) v_jh
    absorbed:     a_h = U_h^T q_h             z_h = softmax_j(scale * (a_h, p_h) (c_j, r_j)) c_j         o_h = W_h z_h

They are equal, since q_h U_h c_j = (U_h^T q_h) c_j and W_h is linear. The first multiplies (nope + rope + value_dim)
numbers per key and head but has to make and keep the keys: for prompts. The second reads latent + rope numbers per key
for all heads together and multiplies (2 latent + rope) per key and head: for decode (mla_attention.py).

DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.errors import ArgumentError
from headrace.kernels.arrays import dtype_name, is_torch, numpy_dtype, shape_of
from headrace.ops.attention_checks import check_rank, check_shape
from headrace.ops.attention_dense import attention
from headrace.ops.attention_options import AttentionResult, Window


def absorb_query(query_nope: Any, key_up: Any) -> Any:
    """Queries [tokens, heads, nope] as queries of the latent, [tokens, heads, latent], in their own type.

    key_up: [heads, nope, latent]. Products and sums are float32, of float64 in float64.
    """
    check_rank("query_nope", shape_of(query_nope, "query_nope"), "tokens, heads, nope")
    check_shape("key_up", key_up, (*shape_of(query_nope, "query_nope")[1:], "latent"))
    return _per_head(query_nope, key_up)


def expand_value(out_latent: Any, value_up: Any) -> Any:
    """Mixtures of latents [tokens, heads, latent] as outputs [tokens, heads, value_dim], in their own type.

    value_up: [heads, value_dim, latent]. Products and sums are float32, of float64 in float64.
    """
    shape = shape_of(out_latent, "out_latent")
    check_rank("out_latent", shape, "tokens, heads, latent")
    check_shape("value_up", value_up, (shape[1], "value_dim", shape[2]))
    return _per_head(out_latent, value_up.swapaxes(1, 2))


def mla_prefill(
    query: Any,
    latent: Any,
    key_rope: Any,
    *,
    key_up: Any,
    value_up: Any,
    query_starts: Any,
    scale: float | None = None,
    key_starts: Any = None,
    key_lens: Any = None,
    causal: bool = True,
    align: str = "bottom_right",
    window: Window = (None, None),
    softcap: float | None = None,
    sinks: Any = None,
    mask: Any = None,
    out_dtype: str | None = None,
    precision: str = "auto",
    deterministic: bool = False,
    kernel: str | None = None,
    require: Sequence[str] = (),
) -> AttentionResult:
    """The un-absorbed form: keys and values are made from the latents, in the query's type, and attended to as usual.

    query: [tokens, heads, nope + rope]; latent: [keys, latent]; key_rope: [keys, rope]; key_up: [heads, nope, latent];
    value_up: [heads, value_dim, latent]. scale: (nope + rope) ** -0.5 when None. Starts and options: attention.py, with
    ragged arrays. Returns out [tokens, heads, value_dim] and lse. Raises ArgumentError for whatever does not fit.
    """
    keys, values = expanded_cache(latent, key_rope, key_up, value_up, dtype=dtype_name(query))
    return attention(
        query,
        keys,
        values,
        causal=causal,
        align=align,
        window=window,
        softcap=softcap,
        sinks=sinks,
        mask=mask,
        scale=scale,
        query_starts=query_starts,
        key_starts=key_starts,
        key_lens=key_lens,
        out_dtype=out_dtype,
        precision=precision,
        deterministic=deterministic,
        kernel=kernel,
        require=require,
    )


def expanded_cache(latent: Any, key_rope: Any, key_up: Any, value_up: Any, *, dtype: str) -> tuple[Any, Any]:
    """Keys [keys, heads, nope + rope] and values [keys, heads, value_dim] of the latents, as `dtype`."""
    check_rank("latent", shape_of(latent, "latent"), "keys, latent")
    num_keys, latent_dim = shape_of(latent, "latent")
    check_shape("key_rope", key_rope, (num_keys, "rope"))
    check_shape("key_up", key_up, ("heads", "nope", latent_dim))
    heads = key_up.shape[0]
    check_shape("value_up", value_up, (heads, "value_dim", latent_dim))
    wide, rope, to_keys, to_values = (_widened(array, dtype) for array in (latent, key_rope, key_up, value_up))
    nope = _product(wide, to_keys.reshape(-1, latent_dim).T).reshape(num_keys, heads, -1)
    values = _product(wide, to_values.reshape(-1, latent_dim).T).reshape(num_keys, heads, -1)
    rope = rope[:, None, :]
    if is_torch(latent):
        import torch

        return _narrowed(torch.cat([nope, rope.expand(-1, heads, -1)], dim=-1), dtype), _narrowed(values, dtype)
    keys = np.concatenate([nope, np.broadcast_to(rope, (num_keys, heads, rope.shape[-1]))], axis=-1)
    return _narrowed(keys, dtype), _narrowed(values, dtype)


def _per_head(rows: Any, matrices: Any) -> Any:
    """rows [tokens, heads, a] x matrices [heads, a, b] -> [tokens, heads, b]."""
    dtype = dtype_name(rows)
    product = _product(_widened(rows, dtype).swapaxes(0, 1), _widened(matrices, dtype))
    return _narrowed(product.swapaxes(0, 1), dtype)


def _product(one: Any, other: Any) -> Any:
    """one @ other, of two types in the wider."""
    if is_torch(one) and one.dtype != other.dtype:
        import torch

        dtype = torch.promote_types(one.dtype, other.dtype)
        one, other = one.to(dtype), other.to(dtype)
    return one @ other


def _widened(array: Any, target: str) -> Any:
    """The array in the type that products for `target` are computed in.

    On a GPU 16-bit numbers stay as they are where the result is no wider: sums are float32 there.
    """
    name = dtype_name(array)
    if is_torch(array):
        if not array.is_cpu and {name, target} <= {"float16", "bfloat16"}:
            return array
        return array.double() if name == "float64" else array.float()
    if name not in ("float64", "float32", "float16", "bfloat16"):
        raise ArgumentError(f"latent attention: expected floats, got {name}")
    return np.asarray(array).astype("float64" if name == "float64" else "float32", copy=False)


def _narrowed(array: Any, dtype: str) -> Any:
    """The array as `dtype`, contiguous."""
    if is_torch(array):
        import torch

        return array.to(getattr(torch, dtype)).contiguous()
    return np.ascontiguousarray(array, dtype=numpy_dtype(dtype))
