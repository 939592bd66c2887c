"""The same work by others' kernels: PyTorch's SDPA and, where installed, flash-attn, FlashInfer, FlashMLA and vLLM's.

A peer is a function that gets everything ready (plans, workspaces) and gives the call that is timed; it raises
ImportError where its package is missing. Each is called as its own users call it, on the memory our kernels read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.bench.gpu_decode import Pages

Call = Callable[[int], Any]
Peers = dict[str, Callable[[], Call]]

SDPA = "torch SDPA"  # whichever of its backends torch picks
_BACKENDS = {"FLASH_ATTENTION": "flash", "EFFICIENT_ATTENTION": "efficient", "CUDNN_ATTENTION": "cuDNN"}
_WORKSPACE_BYTES = 256 << 20  # FlashInfer's, as its documentation has it


def wanted_peers(peers: Mapping[str, Callable[[], Call]], asked: Sequence[str]) -> Peers:
    """Those whose names begin with one of these words, all when there are none; torch's own always."""
    kept = ("torch", "SDPA", *asked)
    return {name: ready for name, ready in peers.items() if not asked or name.startswith(kept)}


# Decode over pages


def paged_peers(batch: Pages, scale: float) -> Peers:
    """Of one token of each request over paged keys and values."""
    peers: Peers = {
        "flashinfer": lambda: _flashinfer_decode(batch, scale),
        "flash_attn": lambda: _flash_attn_decode("flash_attn", "block_table", batch, scale),
        "flash_attn 3": lambda: _flash_attn_decode("flash_attn_interface", "page_table", batch, scale),
        "vllm": lambda: _vllm_decode(batch, scale),
    }
    if len(set(batch.key_lens)) > 1:
        return peers
    dense = [tuple(batch.in_order(pool, s).transpose(1, 2) for pool in (0, 1)) for s in range(len(batch.tables))]
    folded = batch.query.unflatten(1, (batch.pools[0].shape[2], -1))  # the heads of a group as rows
    ways = sdpa_peers([(batch.query[:, :, None], *keys) for keys in dense], scale, causal=False)
    rows = [(folded, *keys) for keys in dense]
    return {**ways, "SDPA, heads as rows": lambda: _sdpa(rows, scale, causal=False), **peers}


def _flashinfer_decode(batch: Pages, scale: float) -> Call:
    import flashinfer

    keys, values = batch.pools
    heads, dim = batch.query.shape[1:]
    wrappers = []
    for table in batch.tables:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(batch), "NHD", use_tensor_cores=True)
        types = {"q_data_type": batch.query.dtype, "kv_data_type": keys.dtype}
        wrapper.plan(*listed_pages(batch, table), heads, keys.shape[2], dim, keys.shape[1], sm_scale=scale, **types)
        wrappers.append(wrapper)
    return lambda number: wrappers[number].run(batch.query, (keys, values))


def _workspace(batch: Pages) -> Any:
    import torch

    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=batch.query.device)


def listed_pages(batch: Pages, table: Any) -> tuple[Any, Any, Any]:
    """Pages as FlashInfer takes them: where each request's begin, all of them in order, tokens of each last one."""
    import torch

    page_size = batch.pools[0].shape[1]
    counts = [-(-length // page_size) for length in batch.key_lens]
    starts = torch.tensor([0, *counts]).cumsum(0).int().to(table.device)
    pages = torch.cat([row[:count] for row, count in zip(table, counts, strict=True)])
    last = [length - (count - 1) * page_size for length, count in zip(batch.key_lens, counts, strict=True)]
    return starts, pages, torch.tensor(last, dtype=torch.int32, device=table.device)


def _flash_attn_decode(module: str, table_name: str, batch: Pages, scale: float) -> Call:
    import importlib

    function = importlib.import_module(module).flash_attn_with_kvcache
    query = batch.query[:, None]

    def call(number: int) -> Any:
        options = {table_name: batch.tables[number], "softmax_scale": scale, "causal": True}
        return function(query, *batch.pools, cache_seqlens=batch.lens, **options)

    return call


def _vllm_decode(batch: Pages, scale: float) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    lens = {"max_seqlen_q": 1, "cu_seqlens_q": batch.starts, "max_seqlen_k": max(batch.key_lens)}
    options = {**lens, "seqused_k": batch.lens, "softmax_scale": scale, "causal": True}
    return lambda number: flash_attn_varlen_func(batch.query, *batch.pools, **options, block_table=batch.tables[number])


def latent_peers(batch: Pages, value_dim: int, scale: float) -> Peers:
    """Of one token of each request over paged latents."""
    return {
        "flash_mla": lambda: _flash_mla_decode(batch, value_dim, scale),
        "flashinfer": lambda: _flashinfer_latent(batch, value_dim, scale),
    }


def _flash_mla_decode(batch: Pages, value_dim: int, scale: float) -> Call:
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    query, pages = batch.query[:, None], batch.pools[0][:, :, None]
    plan = get_mla_metadata(batch.lens, query.shape[2], 1)
    return lambda number: flash_mla_with_kvcache(
        query, pages, batch.tables[number], batch.lens, value_dim, *plan, softmax_scale=scale, causal=True
    )


def _flashinfer_latent(batch: Pages, value_dim: int, scale: float) -> Call:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    query = batch.query[..., :value_dim].contiguous(), batch.query[..., value_dim:].contiguous()
    pages = batch.pools[0]
    sizes = (query[0].shape[1], value_dim, query[1].shape[-1], pages.shape[1])
    wrappers = []
    for table in batch.tables:
        wrapper = BatchMLAPagedAttentionWrapper(_workspace(batch))
        starts, listed, _ = listed_pages(batch, table)
        wrapper.plan(batch.starts, starts, listed, batch.lens, *sizes, True, scale, query[0].dtype, pages.dtype)
        wrappers.append(wrapper)
    return lambda number: wrappers[number].run(*query, pages[..., :value_dim], pages[..., value_dim:])


# Dense


def dense_peers(arrays: tuple[Any, Any, Any], scale: float) -> Peers:
    """Of causal attention, [batch, tokens, heads, head_dim]. One query sees all keys, which torch calls not causal."""
    peers = sdpa_peers([heads_first(arrays)], scale, causal=arrays[0].shape[1] > 1)
    if arrays[0].dtype.itemsize > 2:
        return peers
    return peers | {
        "flash_attn": lambda: _flash_attn("flash_attn", arrays, scale),
        "flash_attn 3": lambda: _flash_attn("flash_attn_interface", arrays, scale),
    }


def backward_peers(arrays: tuple[Any, Any, Any], d_out: Any, scale: float) -> Peers:
    """Of the gradients alone: torch's graph is kept."""
    tensors, theirs = heads_first(arrays), d_out.transpose(1, 2)
    return {
        SDPA: lambda: _gradients(lambda inputs: _sdpa([inputs], scale, causal=True)(0), tensors, theirs),
        "flash_attn": lambda: _gradients(lambda inputs: _flash_attn("flash_attn", inputs, scale)(0), arrays, d_out),
    }


def heads_first(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """As torch takes them, [batch, heads, tokens, head_dim]; the same memory."""
    return tuple(array.transpose(1, 2) for array in arrays)


def _flash_attn(module: str, arrays: Sequence[Any], scale: float) -> Call:
    import importlib

    function = importlib.import_module(module).flash_attn_func
    return lambda number: function(*arrays, softmax_scale=scale, causal=True)


def _gradients(attend: Callable[[Any], Any], arrays: Sequence[Any], d_out: Any) -> Call:
    import torch

    with torch.enable_grad():
        inputs = [array.detach().requires_grad_() for array in arrays]
        out = attend(inputs)
    return lambda number: torch.autograd.grad(out, inputs, d_out, retain_graph=True)


def sdpa_peers(sets: Sequence[tuple[Any, ...]], scale: float, *, causal: bool) -> Peers:
    """SDPA as torch picks it, and each of its fused backends; sets of [batch, heads, tokens, head_dim]."""
    peers: Peers = {SDPA: lambda: _sdpa(sets, scale, causal=causal)}
    for backend, name in _BACKENDS.items():
        peers[f"SDPA {name}"] = functools.partial(_sdpa, sets, scale, causal=causal, backend=backend)
    return peers


def _sdpa(sets: Sequence[Any], scale: float, *, causal: bool, backend: str = "") -> Call:
    import contextlib

    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    shared = sets[0][0].shape[1] != sets[0][1].shape[1]

    def call(number: int) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext():
            query, key, value = sets[number]
            return sdpa(query, key, value, is_causal=causal, scale=scale, enable_gqa=shared)

    return call


def matmul_peer(x: Any, sets: Sequence[Sequence[Any]]) -> Callable[[], Call]:
    """torch's own products of x with matrices of its type."""

    def ready() -> Call:
        from torch.nn.functional import linear

        return lambda number: [linear(x, weight) for weight in sets[number]]

    return ready
