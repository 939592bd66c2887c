"""The formula of attention's gradients against PyTorch's autograd and a step along them: what kernels are held to."""

import numpy as np
import pytest
import torch

from headrace.check.attention_cases import dense, heads
from headrace.check.attention_gradients import (
    GRADIENTS,
    NAMES,
    assert_gradients_close,
    expected,
    gradient_batch,
    reference,
    straightforward,
)
from headrace.ops.attention_dense import reference as attention
from headrace.ops.attention_gradients import AttentionGradients


def by_autograd(query, keys, values, d_out, *, bias, options, sinks, d_lse, own):
    """One request's gradients as PyTorch derives them from the plain formula, in float64."""
    arrays = [array.astype(np.float64) for array in (query, keys, values)]
    inputs = [torch.tensor(array, requires_grad=True) for array in arrays]
    sink = None if sinks is None else torch.tensor(sinks.astype(np.float64), requires_grad=True)
    group, hidden = query.shape[1] // keys.shape[1], torch.tensor(np.isneginf(bias))
    q, k, v = inputs[0], *(each.repeat_interleave(group, dim=1) for each in inputs[1:])
    scores = options.scale * torch.einsum("qhd,khd->hqk", q, k)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = (scores + torch.tensor(np.where(np.isneginf(bias), 0, bias))).masked_fill(hidden, -1e300)
    seeing = torch.tensor(~np.isneginf(bias).all(axis=-1)).expand(scores.shape[:2])
    rows = scores[seeing]  # rows that see nothing have no gradient, and none of NaN
    lse = torch.logsumexp(rows, dim=-1)
    total = lse if sink is None else torch.logaddexp(lse, sink[:, None].expand(seeing.shape)[seeing])
    weights = torch.zeros(scores.shape, dtype=torch.float64)
    weights[seeing] = torch.exp(rows - total[:, None])
    out = torch.einsum("hqk,khd->qhd", weights, v)
    loss = (out * torch.tensor(d_out.astype(np.float64))).sum()
    loss = loss + (lse * torch.tensor(d_lse.astype(np.float64).T)[seeing]).sum()
    wanted = inputs if sink is None else [*inputs, sink]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    gradients = [np.zeros(x.shape) if g is None else g.numpy() for g, x in zip(found, wanted, strict=True)]
    return AttentionGradients(*gradients)


@pytest.mark.parametrize("case", GRADIENTS[-2::-2], ids=lambda case: case.name)
@pytest.mark.costly
def test_the_reference_is_what_autograd_derives(case):
    batch, exact, _ = expected(case, "float64", "float64", 0)
    assert_gradients_close(reference(batch, by_autograd), exact, straightforward(batch, exact, "fp64"))


def test_the_reference_grows_as_out_and_lse_do():
    """A step along the gradients changes the loss by their square, to second order."""
    case = dense("step", 1, 7, 9, softcap=3.0, sinks=True, **heads(2, 1, 5))
    batch = gradient_batch(case, "float64", "float64")

    def loss(step):
        moved = {name: batch[name] + step * getattr(exact, name) for name in NAMES}
        kept = {name: batch[name] for name in ("causal", "softcap", "scale")}
        result = attention(**moved, **kept)
        return (result.out * batch["d_out"]).sum() + (result.lse * batch["d_lse"]).sum()

    exact = reference(batch)
    square = sum((getattr(exact, name) ** 2).sum() for name in NAMES)
    errors = [abs((loss(h) - loss(-h)) / (2 * h) - square) for h in (1e-2, 1e-3)]
    assert errors[1] < errors[0] / 50  # the error of a central difference falls with the square of the step
