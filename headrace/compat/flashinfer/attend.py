"""A call of the library as calls of ours: its options, scales, caches of any type, base-2 log-sum-exp."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headrace.compat.flashinfer.batch import Batch, as_gathered, gathered
from headrace.compat.flashinfer.positions import (
    Alibi,
    alibi_of,
    checked_mode,
    key_positions,
    llama_rotated,
    query_positions,
)
from headrace.ops import attention, paged_attention

LOG2_E = 1 / math.log(2)

Scale = float | Tensor | None
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CACHED = (*_FLOATS, torch.float64, torch.float8_e4m3fn, torch.int8)  # what kernels read


@dataclass(frozen=True)
class Variant:
    """The options of a call in the library's words: -1 for no window, None or 0 for no cap."""

    causal: bool = False
    pos_encoding_mode: str = "NONE"
    window_left: int = -1
    window_right: int = -1
    logits_soft_cap: float | None = None
    sm_scale: float | None = None
    rope_scale: float | None = None
    rope_theta: float | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        checked_mode(self.pos_encoding_mode)
        if self.pos_encoding_mode == "ALIBI" and self.softcap is not None:
            raise NotImplementedError(
                'logits_soft_cap: not with pos_encoding_mode="ALIBI", where the library scales twice; use one of them'
            )

    @property
    def softcap(self) -> float | None:
        """None for no cap."""
        return self.logits_soft_cap if self.logits_soft_cap and self.logits_soft_cap > 0 else None

    def options(self) -> dict[str, Any]:
        """Those that our ops have too, in their words."""
        left = None if self.window_left < 0 else self.window_left
        right = None if self.causal or self.window_right < 0 else self.window_right
        options = {"causal": self.causal, "window": (left, right), "softcap": self.softcap}
        return {**options, "deterministic": self.deterministic}


@dataclass(frozen=True)
class Scales:
    """What codes are multiplied by: a number, or one for each head ([heads] of the query, [kv_heads] of the others)."""

    query: Scale = None
    key: Scale = None
    value: Scale = None


@dataclass(frozen=True)
class Place:
    """Where results go: buffers of the caller's, or a type for a new one (by default the query's)."""

    out: Tensor | None = None
    lse: Tensor | None = None
    dtype: torch.dtype | None = None


UNSCALED, NEW = Scales(), Place()


def attend(
    q: Tensor,
    keys_and_values: tuple[Tensor, Tensor],
    batch: Batch,
    variant: Variant,
    *,
    scales: Scales = UNSCALED,
    sinks: Tensor | None = None,
    place: Place = NEW,
) -> tuple[Tensor, Tensor]:
    """out [tokens, heads, value_dim] and the base-2 log-sum-exp [tokens, heads], without sinks, float32.

    Pages [pages, page_size, kv_heads, dim] or arrays [tokens, kv_heads, dim], as the batch has them. Nothing is copied
    but keys that are rotated here and caches in float8_e5m2. A row that sees no key: 0 and -inf.
    """
    keys, values = keys_and_values
    _check(q, keys, values, batch)
    query, scale = _scaled(q, keys.shape[-2], variant.sm_scale, scales)
    rotates = variant.pos_encoding_mode == "ROPE_LLAMA"
    if rotates or not {keys.dtype, values.dtype} <= set(_CACHED):
        keys, values, batch = gathered(keys, batch), gathered(values, batch), as_gathered(batch)
    if rotates:
        turn = (variant.rope_theta or 1e4, variant.rope_scale or 1.0)
        query = llama_rotated(query, query_positions(batch), *turn)
        keys = llama_rotated(keys, key_positions(batch), *turn)
    alibi = alibi_of(batch, q.shape[1], variant.causal) if variant.pos_encoding_mode == "ALIBI" and len(q) else None
    given = {**variant.options(), **_biases(batch, alibi), "scale": scale}
    given["sinks"] = None if sinks is None else sinks.float().contiguous()
    wanted = place.out.dtype if place.out is not None else place.dtype or q.dtype
    result = _launched(query, keys, values, batch, {**given, **_written(wanted, query, keys, scales, place.out)})
    return _finished(result.out, wanted, scales.value, place.out), _base_2(result.lse, alibi, place.lse)


def _check(q: Tensor, keys: Tensor, values: Tensor, batch: Batch) -> None:
    if len(q) != batch.num_tokens:
        raise ValueError(f"q: expected {batch.num_tokens} tokens by qo_indptr or q_len_per_req, got {len(q)}")
    for name, array in (("k", keys), ("v", values)):
        if array.dtype == torch.uint8:
            raise NotImplementedError(
                f"{name}: packed 4-bit caches (NVFP4) are not read; use float8_e4m3fn with k_scale and v_scale"
            )


def _scaled(q: Tensor, kv_heads: int, sm_scale: float | None, scales: Scales) -> tuple[Tensor, float]:
    """The query in a type that kernels read, and what its products with keys are multiplied by."""
    scale = q.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    query = q.to(torch.bfloat16) if q.element_size() == 1 else q  # which holds every code
    for factor in (scales.query, scales.key):
        if isinstance(factor, Tensor) and factor.numel() > 1:
            wide = query.to(torch.promote_types(query.dtype, torch.float32))
            query = wide * per_head(factor, q.shape[1]).to(wide.dtype)
        elif factor is not None:
            scale *= float(factor)
    return query, scale


def per_head(factor: Tensor, num_heads: int) -> Tensor:
    """[num_heads, 1] of a factor for each head or KV head."""
    return factor.flatten().repeat_interleave(num_heads // factor.numel())[:, None]


def _biases(batch: Batch, alibi: Alibi | None) -> dict[str, Tensor | None]:
    if alibi is None:
        return {"mask": batch.mask}
    return {"mask": alibi.mask, "alibi_slopes": alibi.slopes}


def _written(wanted: torch.dtype, query: Tensor, keys: Tensor, scales: Scales, out: Tensor | None) -> dict[str, Any]:
    """What a kernel writes: the result itself, in its buffer, or one in a wide type that it is made of."""
    exact = torch.float64 in (query.dtype, keys.dtype)
    direct = scales.value is None and (wanted == torch.float64 if exact else wanted in _FLOATS)
    if direct:
        return {"out": out, "out_dtype": str(wanted).removeprefix("torch.")}
    return {"out": None, "out_dtype": "float64" if exact else "float32"}


def _launched(query: Tensor, keys: Tensor, values: Tensor, batch: Batch, given: dict[str, Any]) -> Any:
    if torch.float64 in (query.dtype, keys.dtype):  # which our ops have for all or none
        query, keys, values = query.double(), keys.double(), values.double()
    if keys.dtype == torch.int8:
        given |= {"key_scales": _ones(keys, batch), "value_scales": _ones(values, batch)}
    if batch.page_table is not None:
        starts = {"query_starts": batch.query_starts}
        return paged_attention(query, keys, values, batch.page_table, batch.key_lens, **starts, **given)
    if len(batch.key_lens) == 1:
        return _dense(query, keys, values, batch, given)
    lens = {"query_starts": batch.query_starts, "key_starts": batch.key_starts, "key_lens": batch.key_lens}
    return attention(query, keys, values, **lens, **given)


def _dense(query: Tensor, keys: Tensor, values: Tensor, batch: Batch, given: dict[str, Any]) -> Any:
    """One request as a batch of one, of which a mask is recognised."""
    assert batch.key_starts is not None
    own = slice(int(batch.key_starts[0]), int(batch.key_starts[0] + batch.key_lens[0]))
    for name in {"key_scales", "value_scales"} & set(given):
        given[name] = given[name][own][None]
    out = given.pop("out")
    lifted = None if out is None else out[None]
    found = attention(query[None], keys[own][None], values[own][None], out=lifted, **given)
    return replace(found, out=found.out[0], lse=found.lse[0])


def _ones(codes: Tensor, batch: Batch) -> Tensor:
    """Scales of 1: the library's are for all of a cache, and are multiplied into scores and results."""
    shape = codes.shape[:-1] if batch.page_table is None else (codes.shape[0], 1, codes.shape[2])
    return torch.ones(shape, dtype=torch.float32)


def _finished(found: Tensor, wanted: torch.dtype, factor: Scale, out: Tensor | None) -> Tensor:
    """The result times the values' scale in the type asked for, in the caller's buffer when there is one."""
    if isinstance(factor, Tensor) and factor.numel() > 1:
        found = found * per_head(factor, found.shape[-2]).to(found.dtype)
    elif factor is not None:
        found = found * float(factor)
    if out is None:
        return found.to(wanted)
    return out if out.data_ptr() == found.data_ptr() else copied(found, out, "out")


def _base_2(lse: Tensor, alibi: Alibi | None, kept: Tensor | None) -> Tensor:
    found = (lse if alibi is None else lse + alibi.shift) * LOG2_E
    return found if kept is None else copied(found, kept, "lse")


def copied(found: Tensor, buffer: Tensor, name: str) -> Tensor:
    """The caller's buffer with the result in it. ValueError where it has another shape."""
    if buffer.shape != found.shape:
        raise ValueError(f"{name}: expected {list(found.shape)}, got {list(buffer.shape)}")
    return buffer.copy_(found)
