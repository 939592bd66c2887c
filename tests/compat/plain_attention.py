"""FlashAttention's formula in plain torch, differentiable: what the tests of its stand-ins hold them against.

plain        out and log-sum-exp in any one type, float64 by default
gradients    those of q, k, v
hold         asserts that results are as near to float64 as the plain computation in their own type
"""

import torch

from headrace.check.compare import assert_within_budget

ORDERS = 4  # summations of which the worst counts: one alone may be right by luck


def plain(
    q,
    k,
    v,
    *,
    causal=False,
    window=(-1, -1),
    softcap=0.0,
    scale=None,
    slopes=None,
    sink=None,
    chunk=0,
    dtype=torch.float64,
    order=None,
):
    """out [batch, queries, heads, value_dim], lse [batch, heads, queries]; a query that sees no key: 0 and -inf.

    order: a seed of the order in which elements, keys and queries are summed; None: as they lie.
    """
    elements, rows, columns = (shuffled(count, order) for count in (q.shape[-1], q.shape[1], k.shape[1]))
    q, k, v = q[:, rows][..., elements], k[:, columns][..., elements], v[:, columns]
    group, queries, keys = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 2), v.to(dtype).repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    own = (rows + keys - queries)[:, None]
    ahead = columns - own
    if slopes is not None:
        scores = scores - slopes.to(dtype)[..., None, None] * ahead.abs().to(dtype)
    unseen = hidden(ahead, causal, window)
    if chunk:
        unseen = unseen | (ahead < -(own % chunk)) | (ahead >= chunk - own % chunk)
    out, lse = mixture(scores.masked_fill(unseen, -torch.inf), v, sink)
    back = rows.argsort()
    return out[:, back], lse[:, :, back]


def shuffled(count, seed):
    """0 .. count in an order of that seed, or as they are."""
    return torch.arange(count) if seed is None else torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def hidden(ahead, causal, window):
    """Which keys a query does not see, by how far they are ahead of its own."""
    found = (ahead > 0) if causal else torch.zeros_like(ahead, dtype=torch.bool)
    if window[0] >= 0:
        found = found | (ahead < -window[0])
    if window[1] >= 0:
        found = found | (ahead > window[1])
    return found


def mixture(scores, v, sink=None):
    """The values [batch, keys, heads, dim] by scores [batch, heads, queries, keys], and the log of their sum."""
    top = torch.zeros(scores.shape[:-1], dtype=scores.dtype)
    if scores.shape[-1]:
        top = scores.detach().amax(-1).nan_to_num(neginf=0.0)
    weights = torch.exp(scores - top[..., None])
    total = weights.sum(-1)
    with_sink = total if sink is None else total + torch.exp(sink.to(scores.dtype)[:, None] - top)
    seeing = with_sink > 0
    divisor = torch.where(seeing, with_sink, torch.ones_like(total))
    lse = torch.where(seeing, torch.log(divisor) + top, -torch.inf)
    if scores.dtype == torch.float32:
        # As a backward pass must, which keeps of a row's weights no more than their sum.
        weights = torch.exp(scores - torch.where(seeing, lse, torch.zeros_like(lse))[..., None])
    else:
        weights = weights / divisor[..., None]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def gradients(q, k, v, *, d_out, d_lse=None, dtype=torch.float64, **options):
    """d_q, d_k, d_v of what weighs out by d_out and lse by d_lse."""
    inputs = [array.detach().to(dtype).requires_grad_() for array in (q, k, v)]
    out, lse = plain(*inputs, dtype=dtype, **options)
    total = (out * d_out.to(dtype)).sum()
    if d_lse is not None:
        total = total + (torch.where(lse == -torch.inf, torch.zeros_like(lse), lse) * d_lse.to(dtype)).sum()
    return torch.autograd.grad(total, inputs)


def hold(got, compute, dtype, *, logarithms=()):
    """Raises AssertionError where one of `got` is farther from compute(dtype=float64) than compute(dtype=dtype) allows.

    compute: of dtype and order, the arrays that `got` are. logarithms: which of them, by number, are of sums.
    """
    exact = compute(dtype=torch.float64)
    worst = [each.clone() for each in exact]
    for order in range(ORDERS):
        for i, other in enumerate(compute(dtype=dtype, order=order)):
            farther = (other.double() - exact[i]).abs() > (worst[i] - exact[i]).abs()
            worst[i] = torch.where(farther, other.double(), worst[i])
    assert len(got) == len(exact)
    for i, (mine, true, low) in enumerate(zip(got, exact, worst, strict=True)):
        name = str(mine.dtype).removeprefix("torch.")
        arrays = [each.detach().double().numpy() for each in (mine, true, low)]
        assert_within_budget(*arrays, name, logarithms=i in logarithms)


def random(*shape, dtype=torch.float32, seed=0):
    """Normal numbers as dtype holds them."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
