"""No call waits for the GPU: torch raises where one does, after a first call that compiled."""

import contextlib

import pytest
import torch
from decode_batch import LENGTHS, attend, decode

from headrace import ops
from headrace.ops import norm

pytestmark = pytest.mark.gpu


@contextlib.contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, dtype=dtype, device="cuda")


def decoding(kind):
    batch = decode(kind, LENGTHS[0])
    tensors = batch.tensors("cuda")
    return lambda: attend(batch, tensors)


def dense():
    query, key, value = randn(2, 64, 8, 64), randn(2, 64, 2, 64), randn(2, 64, 2, 64)
    return lambda: ops.attention(query, key, value, causal=True)


def backward():
    query, key, value = randn(2, 64, 8, 64), randn(2, 64, 2, 64), randn(2, 64, 2, 64)
    found = ops.attention(query, key, value, causal=True)
    d_out = torch.randn_like(found.out)
    return lambda: ops.attention_backward(d_out, query, key, value, found.out, lse=found.lse, causal=True)


def ragged():
    query, key, value = randn(70, 8, 64), randn(70, 2, 64), randn(70, 2, 64)
    starts = torch.tensor([0, 3, 40, 70], dtype=torch.int32, device="cuda")
    return lambda: ops.attention(query, key, value, query_starts=starts, key_starts=starts, causal=True)


def append():
    key, value, pages = randn(5, 2, 64), randn(5, 2, 64), randn(2, 2, 16, 2, 64)
    slots = torch.tensor([3, 31, 0, 7, 16], dtype=torch.int32, device="cuda")
    return lambda: ops.append_pages(key, value, pages[0], pages[1], slots=slots)


def merge():
    parts = [ops.attention(randn(1, 4, 2, 64), randn(1, 9, 2, 64), randn(1, 9, 2, 64)) for _ in range(3)]
    return lambda: ops.merge_attention(parts)


def rms_norm():
    x, weight = randn(5, 128), randn(128, dtype=torch.float32)
    return lambda: norm.rms_norm(x, weight)


CALLS = {
    "paged": lambda: decoding("paged"),
    "latent": lambda: decoding("latent"),
    **{function.__name__: function for function in (dense, backward, ragged, append, merge, rms_norm)},
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_gpu(name):
    call = CALLS[name]()
    call()
    with no_waiting():
        call()


def test_the_watch_sees_who_waits():
    numbers = randn(3)
    with no_waiting(), pytest.raises(RuntimeError, match="(?i)synchroniz"):
        numbers.sum().item()
