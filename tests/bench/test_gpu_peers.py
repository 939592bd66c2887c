"""Others' kernels in `bench gpu`: called with the arguments they take, headrace.compat standing in for them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from headrace.bench import gpu_decode, gpu_peers, gpu_prefill  # noqa: E402
from headrace.bench.gpu_reference import Gradients, gradients  # noqa: E402
from headrace.ops import attention, attention_backward, mla_attention, paged_attention  # noqa: E402

HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 32, "dtype": "bfloat16"}
LATENT = {"heads": 4, "head_dim": 576, "value_dim": 512, "dtype": "bfloat16"}
LENS = (70, 5, 129)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own functions of the same names and signatures."""
    from headrace.compat import flash_attn, flash_attn_interface, flash_mla, flashinfer

    vllm = types.ModuleType("vllm.vllm_flash_attn")
    vllm.flash_attn_varlen_func = _varlen  # type: ignore[attr-defined]
    modules = {"flash_attn": flash_attn, "flash_mla": flash_mla, "flashinfer": flashinfer}
    modules |= {
        "flashinfer.mla": flashinfer,
        "flash_attn_interface": flash_attn_interface,
        "vllm.vllm_flash_attn": vllm,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))


def _varlen(query: Any, *pools: Any, cu_seqlens_q: Any, seqused_k: Any, block_table: Any, **options: Any) -> Any:
    assert options.pop("max_seqlen_q") == 1 and options.pop("max_seqlen_k") == max(LENS)
    assert options.pop("causal") and options.keys() == {"softmax_scale"}
    scale = options["softmax_scale"]
    return paged_attention(query, *pools, block_table, seqused_k, query_starts=cu_seqlens_q, scale=scale).out


def pages_of(sizes: dict[str, Any], shapes: list[tuple[int, ...]]) -> gpu_decode.Pages:
    pools, tables = gpu_decode.make_pages(sizes["key_lens"], sizes["page_size"], shapes, sizes["dtype"], "cpu")
    return gpu_decode._batch(sizes, pools, tables, "cpu")


def of_type(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    """In float32 where torch computes it: its sums in bfloat16 are not ours."""
    return {**sizes, "dtype": "float32"} if "SDPA" in name else sizes


@pytest.mark.parametrize("name", ["flashinfer", "flash_attn", "flash_attn 3", "vllm"])
def test_decode_over_pages(name: str) -> None:
    batch = pages_of({"key_lens": LENS, "page_size": 256, **HEADS}, [(2, 32)] * 2)
    call = gpu_peers.paged_peers(batch, 0.2)[name]()
    for number, table in enumerate(batch.tables):
        ours = paged_attention(batch.query, *batch.pools, table, batch.lens, query_starts=batch.starts, scale=0.2).out
        torch.testing.assert_close(call(number).reshape(ours.shape), ours)


@pytest.mark.parametrize("name", ["torch SDPA", "SDPA, heads as rows"])
def test_decode_by_torch_is_on_the_same_memory(name: str) -> None:
    batch = pages_of(of_type({"key_lens": (64, 64), "page_size": 16, **HEADS}, name), [(2, 32)] * 2)
    call = gpu_peers.paged_peers(batch, 0.2)[name]()
    for number in range(len(batch.tables)):
        keys, values = (batch.in_order(pool, number) for pool in (0, 1))
        assert keys.data_ptr() == batch.pools[0][1 + 8 * number].data_ptr()
        ours = attention(batch.query[:, None], keys, values, scale=0.2).out
        torch.testing.assert_close(call(number).reshape(ours.shape), ours)


def test_requests_of_unequal_lengths_are_no_work_for_torch() -> None:
    batch = pages_of({"key_lens": LENS, "page_size": 16, **HEADS}, [(2, 32)] * 2)
    assert not any("SDPA" in name for name in gpu_peers.paged_peers(batch, 0.2))


@pytest.mark.parametrize("name", ["flash_mla", "flashinfer"])
def test_decode_over_latents(name: str) -> None:
    batch = pages_of({"key_lens": LENS, "page_size": 64, **LATENT}, [(576,)])
    call = gpu_peers.latent_peers(batch, 512, 0.07)[name]()
    options = {"query_starts": batch.starts, "value_dim": 512, "scale": 0.07}
    for number, table in enumerate(batch.tables):
        ours = mla_attention(batch.query, *batch.pools, table, batch.lens, **options).out
        found = call(number)
        found = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(found.reshape(ours.shape), ours)


DENSE = {"batch": 2, "tokens": 40, **HEADS}


@pytest.mark.parametrize("name", ["torch SDPA", "flash_attn", "flash_attn 3"])
def test_dense(name: str) -> None:
    arrays = gpu_prefill._arrays(of_type(DENSE, name), "cpu")
    ours = attention(*arrays, causal=True, scale=0.2).out
    found = gpu_peers.dense_peers(arrays, 0.2)[name]()(0)
    torch.testing.assert_close(found.transpose(1, 2) if "SDPA" in name else found, ours)


@pytest.mark.parametrize("name", ["torch SDPA", "flash_attn"])
def test_gradients(name: str) -> None:
    arrays = gpu_prefill._arrays(of_type(DENSE, name), "cpu")
    found = attention(*arrays, causal=True, scale=0.2)
    d_out = torch.randn_like(found.out)
    ours = attention_backward(d_out, *arrays, found.out, lse=found.lse, causal=True, scale=0.2)
    with torch.no_grad():
        theirs = gpu_peers.backward_peers(arrays, d_out, 0.2)[name]()(0)
    for their, our in zip(theirs, (ours.query, ours.key, ours.value), strict=True):
        torch.testing.assert_close(their.transpose(1, 2) if "SDPA" in name else their, our)


def test_one_query_sees_all_keys() -> None:
    arrays = gpu_prefill._arrays({**DENSE, "queries": 1, "dtype": "float32"}, "cpu")
    ours = attention(*arrays, causal=True, scale=0.2).out
    torch.testing.assert_close(gpu_peers.dense_peers(arrays, 0.2)["torch SDPA"]()(0).transpose(1, 2), ours)


def test_float32_is_no_work_for_flash_attn() -> None:
    arrays = gpu_prefill._arrays({**DENSE, "dtype": "float32"}, "cpu")
    assert not any("flash_attn" in name for name in gpu_peers.dense_peers(arrays, 0.2))


def test_products_by_torch() -> None:
    x, weights = torch.randn(2, 8), [torch.randn(3, 8), torch.randn(5, 8)]
    call: Callable[[int], Any] = gpu_peers.matmul_peer(x, [weights])()
    assert [tuple(out.shape) for out in call(0)] == [(2, 3), (2, 5)]


def test_the_formula_of_gradients_is_that_of_the_ops() -> None:
    arrays = [array.double() for array in gpu_prefill._arrays({**DENSE, "kv_heads": 1, "batch": 1}, "cpu")]
    inputs = [array.requires_grad_() for array in arrays]
    out = attention(*inputs, causal=True, scale=0.2).out
    d_out = torch.randn_like(out)
    exact = torch.autograd.grad(out, inputs, d_out)
    sample = Gradients(
        *(array[0].transpose(0, 1).detach() for array in inputs[:1]), *(a[0, :, 0].detach() for a in inputs[1:])
    )
    found = gradients(d_out[0].transpose(0, 1), sample, 0.2, narrow=False)
    assert torch.allclose(found.query.transpose(0, 1), exact[0][0])
    assert torch.allclose(found.key, exact[1][0, :, 0]) and torch.allclose(found.value, exact[2][0, :, 0])
