"""merge_attention of torch tensors: gradients of the formula, parts without keys left alone."""

import itertools

import pytest
import torch

from headrace import ops


def parts_of(count=3, dtype=torch.float64, rows=(2, 5), heads=4, dim=6):
    random = torch.Generator().manual_seed(0)
    lse = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        (
            torch.randn(*rows, heads, dim, dtype=dtype, generator=random).requires_grad_(),
            torch.randn(*rows, heads, dtype=lse, generator=random).requires_grad_(),
        )
        for _ in range(count)
    ]


def merged(*tensors, sinks=None):
    result = ops.merge_attention(list(zip(tensors[::2], tensors[1::2], strict=True)), sinks=sinks)
    return result.out, result.lse


@pytest.mark.parametrize("count", [1, 2, 5])
def test_gradients_are_those_of_small_changes(count):
    flat = [tensor for part in parts_of(count) for tensor in part]
    assert torch.autograd.gradcheck(merged, flat, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *tensors: merged(*tensors, sinks=torch.ones(4)), flat, fast_mode=True)
    assert torch.autograd.gradgradcheck(merged, flat[:2], fast_mode=True)


def test_sinks_have_the_gradient_of_the_formula():
    parts = [(out.detach(), lse.detach()) for out, lse in parts_of()]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)
    ops.merge_attention(parts, sinks=sinks).out.sum().backward()
    exact = sinks.detach().double().requires_grad_()
    lses = torch.stack([lse for _, lse in parts])
    weights = torch.exp(lses - torch.logaddexp(torch.logsumexp(lses, 0), exp_of(exact)))
    sum((weight[..., None] * out).sum() for weight, (out, _) in zip(weights, parts, strict=True)).backward()
    torch.testing.assert_close(sinks.grad, exact.grad.float())


def exp_of(sinks):
    return sinks.expand(2, 5, 4)


def test_a_part_without_keys_is_not_looked_at():
    (out, lse), (other, other_lse) = parts_of(2, torch.float32)
    with torch.no_grad():
        out[0], lse[0] = float("nan"), -torch.inf
        lse[0, 0], other_lse[0, 0] = -torch.inf, -torch.inf  # a row that no part saw
        other[0, 0] = float("nan")
    result = ops.merge_attention([(out, lse), (other, other_lse)])
    result.out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (out, lse, other, other_lse))
    assert not out.grad[0].any() and not other.grad[0, 0].any() and (other.grad[0, 1:] == 1).all()


def test_out_is_refused_where_gradients_are_wanted():
    parts = parts_of()
    with pytest.raises(NotImplementedError, match="out: "):
        ops.merge_attention(parts, out=ops.AttentionResult(*(array.detach() for array in parts[0])))


@pytest.mark.parametrize("dtype,sinks", [(torch.float32, True), (torch.bfloat16, False), (torch.float64, False)])
def test_the_operator_passes_torchs_checks(dtype, sinks):
    outs, lses = zip(*parts_of(3, dtype), strict=True)
    given = [list(outs), list(lses), torch.zeros(4, requires_grad=True) if sinks else None]
    torch.library.opcheck(torch.ops.headrace.merge_attention.default, given, {"out_dtype": None, "kernel_name": None})


def test_merged_gradients_are_those_of_attention_over_all_keys():
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 2, 8, dtype=torch.float64, generator=random) for n in (5, 9, 9))
    found = []
    for cuts in ((0, 9), (0, 4, 9)):
        leaves = [array.clone().requires_grad_() for array in (query, key, value)]
        parts = [ops.attention(leaves[0], leaves[1][:, a:b], leaves[2][:, a:b]) for a, b in itertools.pairwise(cuts)]
        result = ops.merge_attention(parts)
        (result.out.square().sum() + result.lse.sum()).backward()
        found.append([leaf.grad for leaf in leaves])
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(whole, cut)
