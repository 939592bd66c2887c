"""torch's operators over kernels that take tensors: by name through autograd, the compiler and autocast, to one result.

Kernels of GPUs run here on tensors of the CPU (TRITON_INTERPRET); what they compute is tested where they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headrace import ops
from headrace.errors import KernelError

KERNEL = "torch_math"


def arrays(dtype: torch.dtype = torch.float64, *, grad: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 5, 4, 8), (2, 9, 2, 8), (2, 9, 2, 6))
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = ops.attention(query, key, value, causal=True, softcap=9.0, kernel=KERNEL)
    return found.out, found.lse


def test_a_kernel_asked_for_by_name_has_the_gradients_of_the_op() -> None:
    ops.reset_choices()
    assert torch.autograd.gradcheck(attended, arrays(), fast_mode=True)
    chosen = ops.choices()
    assert chosen["attention", KERNEL] > 0 and ("attention", "cpu_float64") not in chosen
    assert any(op == "attention_backward" for op, _ in chosen)


def test_the_compiler_sees_one_node_that_runs_it() -> None:
    ops.reset_choices()
    compiled = torch.compile(attended, backend="aot_eager", fullgraph=True)
    found, expected = compiled(*arrays()), attended(*arrays())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert ops.choices()["attention", KERNEL] == 2


def test_autocast_makes_its_type_of_what_goes_in() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.attention(*arrays(torch.float32, grad=False), kernel=KERNEL)
    assert found.out.dtype == torch.bfloat16 and found.lse.dtype == torch.float32


def test_the_operator_passes_torchs_own_checks() -> None:
    options = {"causal": True, "align": "bottom_right", "window_left": None, "window_right": None, "softcap": None}
    options |= {"scale": None, "precision": "auto", "deterministic": False}
    choice: dict[str, Any] = {"out_dtype": None, "kernel_name": KERNEL, "require": ""}
    given = (*arrays(), *[None] * 8)
    torch.library.opcheck(torch.ops.headrace.attention.default, given, {**options, **choice})


def test_a_kernel_that_cannot_says_so_through_the_operator_too() -> None:
    query, key, value = arrays(torch.float32)
    with pytest.raises(KernelError, match="kernel 'torch_cudnn' cannot run this attention: value_dim"):
        ops.attention(query, key, value, kernel="torch_cudnn")


def test_results_lie_where_the_query_does() -> None:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = [torch.empty(array.shape, dtype=torch.bfloat16, device="cuda") for array in arrays()]
        options = {"causal": False, "align": "bottom_right", "window_left": None, "window_right": None}
        options |= {"softcap": None, "scale": None, "precision": "auto", "deterministic": False}
        choice = {"out_dtype": "float32", "kernel_name": None, "require": ""}
        out, lse = torch.ops.headrace.attention.default(*fake, *[None] * 8, **options, **choice)
    assert (out.device.type, lse.device.type, out.dtype, lse.dtype) == ("cuda", "cuda", torch.float32, torch.float32)
