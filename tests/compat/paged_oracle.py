"""What attention over a cache is, in plain torch; caches full of NaN but where tokens lie; and what is near enough.

Request     one request's queries and keys, and what it may see
attended    the formula, in any type
hold        asserts that results are as near to float64 as the plain formula in the arrays' own type
Cache       keys and values of requests in pages, in the layouts of other libraries
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from headrace.check.compare import assert_within_budget

ORDERS = 4  # summations of which the worst counts: one alone may be right by luck
LN_2 = math.log(2)


@dataclass
class Request:
    """q [queries, heads, dim], k [keys, kv_heads, dim], v [keys, kv_heads, value_dim]; options of `attended`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict = field(default_factory=dict)


def attended(
    q,
    k,
    v,
    *,
    scale=None,
    causal=False,
    left=None,
    seen=None,
    cap=None,
    bias=None,
    sink=None,
    dtype=torch.float64,
    order=None,
):
    """out [queries, heads, value_dim] and the natural lse [queries, heads]; queries stand at the last keys.

    seen bool [queries, keys]; bias [heads, queries, keys], added to scores; sink [heads]; order: of the elements in
    which products are summed. A query that sees no key: 0 and -inf.
    """
    group, queries, keys = q.shape[1] // k.shape[1], len(q), len(k)
    q, k = (q, k) if order is None else (q[..., order], k[..., order])
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    wide = torch.promote_types(dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q, k).to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = cap * torch.tanh(scores / cap) if cap else scores
    scores = scores if bias is None else scores + bias.to(wide)
    ahead = torch.arange(keys) - (torch.arange(queries) + keys - queries)[:, None]
    visible = torch.ones(queries, keys, dtype=torch.bool) if seen is None else seen
    visible = visible & (ahead <= 0) if causal else visible
    visible = visible if left is None else visible & (ahead >= -left)
    return mixed(scores.masked_fill(~visible, -torch.inf), v, sink, dtype)


def mixed(scores, v, sink, dtype):
    """Values [keys, heads, dim] by scores [heads, queries, keys], and the log of the sum of their weights."""
    top = scores.amax(-1).nan_to_num(neginf=0.0) if scores.shape[-1] else torch.zeros(scores.shape[:-1]).to(scores)
    weights = torch.exp(scores - top[..., None])
    total = weights.sum(-1)
    divisor = total if sink is None else total + torch.exp(sink.to(scores.dtype)[:, None] - top)
    divisor = torch.where(divisor > 0, divisor, 1)
    out = torch.einsum("hqk,khd->qhd", (weights / divisor[..., None]).to(dtype), v)
    return out, torch.where(total > 0, torch.log(total) + top, -torch.inf).T


def of_requests(requests, dtype=torch.float64, order=None):
    """The formula for requests one after the other: out [tokens, heads, dim] and lse [tokens, heads]."""
    parts = [attended(r.q, r.k, r.v, dtype=dtype, order=order, **r.options) for r in requests]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def hold(out, lse, requests, *, base_2=True, factor=1.0, dtype=None):
    """Raises AssertionError where out or lse is farther from float64 than the plain formula in dtype allows.

    factor: that out is multiplied by. dtype: of the formula that sets the budget, by default that of the queries.
    """
    dtype = dtype or requests[0].q.dtype
    unit = LN_2 if base_2 else 1.0
    exact = of_requests(requests)
    worst = [each.clone() for each in exact]
    for seed in range(ORDERS):
        order = torch.randperm(requests[0].q.shape[-1], generator=torch.Generator().manual_seed(seed))
        for i, other in enumerate(of_requests(requests, dtype, order)):
            farther = (other.double() - exact[i]).abs() > (worst[i] - exact[i]).abs()
            worst[i] = torch.where(farther, other.double(), worst[i])
    near(out, exact[0] * factor, worst[0] * factor)
    if lse is not None:
        near(lse, exact[1] / unit, worst[1] / unit, logarithms=True)


def near(got, exact, plain, *, logarithms=False):
    """The budget of check/compare.py, for tensors; plain is rounded to the type of what was got."""
    assert got.shape == exact.shape, f"{tuple(got.shape)}, expected {tuple(exact.shape)}"
    values = [each.detach().double().numpy() for each in (got, exact, plain.to(got.dtype))]
    assert_within_budget(*values, str(got.dtype).removeprefix("torch."), logarithms=logarithms)


def normal(*shape, dtype=torch.float32, seed=0):
    """Normal numbers as dtype holds them."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(torch.float32).to(dtype)


@dataclass
class Cache:
    """Keys and values of requests in pages: in any order, NaN wherever no token lies, as codes of any type."""

    keys: torch.Tensor  # [pages, page_size, kv_heads, dim]
    values: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    lens: list

    @property
    def page_size(self):
        return self.keys.shape[1]

    def arrays(self, kv_layout="NHD", pair=True):
        """As a library takes it: a pair or one array, heads before or behind the tokens of a page."""
        keys, values = self.keys, self.values
        if kv_layout == "HND":
            keys, values = (array.transpose(1, 2).contiguous() for array in (keys, values))
        return (keys, values) if pair else torch.stack([keys, values], 1)

    def of(self, request):
        """The keys and values of one request, [keys, kv_heads, dim], as numbers."""
        pages = self.indices[self.indptr[request] : self.indptr[request + 1]].long()
        numbers = (array.float() if array.element_size() == 1 else array for array in (self.keys, self.values))
        return tuple(array[pages].flatten(0, 1)[: self.lens[request]] for array in numbers)


def cache_of(lens, page_size=4, kv_heads=2, dim=16, *, value_dim=None, dtype=torch.float32, seed=0):
    """A cache of requests of these lengths; the list of pages goes on behind the last with numbers of no page."""
    counts = [-(-n // page_size) for n in lens]
    num_pages = sum(counts) + 2
    poison = 0 if dtype == torch.int8 else torch.nan
    shape = (num_pages, page_size, kv_heads)
    arrays = []
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    for part, size in enumerate((dim, value_dim or dim)):
        numbers = normal(*shape, size, seed=seed + 1 + part) * (40 if dtype == torch.int8 else 1)
        used = torch.zeros(num_pages, page_size, dtype=torch.bool)
        for (begin, end), n in zip(pairwise(starts(counts)), lens, strict=True):
            for i, page in enumerate(order[begin:end].tolist()):
                used[page, : min(page_size, n - i * page_size)] = True
        arrays.append(torch.where(used[..., None, None], numbers, poison).to(dtype))
    indices = torch.cat([order[: sum(counts)], torch.tensor([2147480000], dtype=torch.int32)])
    last = torch.tensor([n - max(c - 1, 0) * page_size for n, c in zip(lens, counts, strict=True)], dtype=torch.int32)
    return Cache(*arrays, torch.tensor(starts(counts), dtype=torch.int32), indices, last, list(lens))


def starts(counts):
    """Where each of so many things in a row begins, and the end."""
    return [0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()]


def indptr(counts):
    """starts as int32."""
    return torch.tensor(starts(counts), dtype=torch.int32)


def requests_of(q, query_lens, cache, **options):
    """The requests of a batch; options: the same for all, or a list of as many."""
    found = []
    for r, (begin, end) in enumerate(pairwise(starts(query_lens))):
        own = {name: value[r] if isinstance(value, list) else value for name, value in options.items()}
        found.append(Request(q[begin:end], *cache.of(r), own))
    return found


def signature(function):
    """Names, order and defaults of a function's arguments, as text."""
    import inspect

    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind == parameter.KEYWORD_ONLY and not any(each.startswith("*") for each in found):
            found.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        found.append(f"{star}{name}{default}")
    return ", ".join(found).removeprefix("self, ")
