"""Which kernel of linear runs on a GPU, and what it refuses by name."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from headrace.errors import ArgumentError, KernelError  # noqa: E402
from headrace.ops import explain  # noqa: E402
from headrace.ops import linear as op  # noqa: E402

KERNEL, INVARIANT, TORCH = "triton_linear", "triton_linear_invariant", "torch_linear"


def small_weight():
    """Of Q4_0, [4, 32]."""
    return op.pack(np.zeros(72, np.uint8), "Q4_0", (4, 32), device="cpu")


@pytest.mark.parametrize("tokens,expected", [(1, KERNEL), (32, KERNEL), (512, TORCH)])
@pytest.mark.parametrize("weight", ["Q4_K", "BF16"])
def test_few_rows_stream_and_many_go_to_torch(tokens, expected, weight):
    dtype = {"x": "bfloat16", "weight": weight}
    told = explain("linear", (tokens, 4096), (4096, 4096), dtype=dtype, device="cuda", arch="sm_90")
    assert told.chosen.kernel == expected


def test_rows_of_one_batch_bind_no_others():
    dtype = {"x": "bfloat16", "weight": "Q4_K"}
    told = explain(
        "linear", (64, 4096), (4096, 4096), dtype=dtype, device="cuda", arch="sm_90", require=("batch_invariant",)
    )
    assert told.chosen.kernel == INVARIANT


def test_weights_for_another_device_are_refused():
    weight = small_weight()
    with pytest.raises(KernelError, match="packed for a gpu"):
        op.linear(torch.ones(1, 32), weight, kernel="cpu_portable")


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda w: op.linear(torch.ones(1, 33), w), "x: expected [tokens, 32]"),
        (lambda w: op.linear(np.ones((1, 32), np.int8), w), "x: expected a dtype"),
        (lambda w: op.linear(np.ones((1, 32), np.float32), w), "x: expected a tensor of torch"),
        (lambda w: op.linear(torch.ones(1, 32), w, bias=torch.ones(5)), "bias: expected [4]"),
        (lambda w: op.linear(torch.ones(1, 32), w, out=torch.ones(1, 5)), "out: expected [1, 4]"),
        (lambda w: op.linear(torch.ones(1, 32), w, residual=torch.ones(4, 1).T[:, ::2]), "residual: expected"),
        (lambda w: op.pack(np.zeros(10, np.uint8), "Q4_0", (1, 32), device="cpu"), "raw: expected 1 rows of 18"),
        (lambda w: op.pack(np.zeros(18, np.uint8), "Q4_0", (1, 33), device="cpu"), "shape: expected rows"),
        (lambda w: op.pack_tensor(torch.zeros(2, 2, dtype=torch.int64)), "weight: expected float32"),
        (lambda w: op.pack_tensor(torch.zeros(2, 32, dtype=torch.int8), torch.ones(3)), "scale: expected [2]"),
    ],
)
def test_bad_arguments_are_named(call, text):
    weight = small_weight()
    with pytest.raises(ArgumentError) as caught:
        call(weight)
    assert text in str(caught.value)
