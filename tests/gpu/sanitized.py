"""One call of a kind of work on the GPU, for the sanitizer to watch: python sanitized.py KIND KERNEL

Prints "ran", or why the kernel cannot.
"""

import sys

import torch
from decode_batch import LENGTHS, attend, decode, gpu_kernels

from headrace import ops
from headrace.errors import KernelError


def randn(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def decoding(kind, kernel):
    batch = decode(kind, LENGTHS[0])
    tensors = batch.tensors("cuda")
    why_not = gpu_kernels(kind, tensors).get(kernel, "there is no such kernel")
    return why_not or (attend(batch, tensors, kernel=kernel) and "")


def dense(kernel):
    ops.attention(randn(1, 130, 4, 128), randn(1, 200, 2, 128), randn(1, 200, 2, 128), causal=True, kernel=kernel)
    return ""


def ragged(kernel):
    starts = torch.tensor([0, 130, 130, 147], dtype=torch.int32, device="cuda")
    query, key, value = randn(147, 8, 128), randn(147, 2, 128), randn(147, 2, 128)
    ops.attention(query, key, value, query_starts=starts, causal=True, window=(50, None), kernel=kernel)
    return ""


def backward(kernel):
    query, key, value = randn(1, 130, 4, 128), randn(1, 130, 2, 128), randn(1, 130, 2, 128)
    found = ops.attention(query, key, value, causal=True)
    d_out = torch.randn_like(found.out)
    ops.attention_backward(d_out, query, key, value, found.out, lse=found.lse, causal=True, kernel=kernel)
    return ""


def main(kind, kernel):
    """What is to be said of the call."""
    try:
        why_not = decoding(kind, kernel) if kind in ("paged", "latent") else globals()[kind](kernel)
    except KernelError as error:
        why_not = error.message.splitlines()[0]
    torch.cuda.synchronize()
    return why_not or "ran"


if __name__ == "__main__":
    print(main(*sys.argv[1:3]))
