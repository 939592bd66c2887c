"""Experts, sampling and logprobs for `headrace bench gpu`: what a token goes through beside attention and products.

Routings are drawn evenly, one for each set of buffers, so that calls read other experts. Half of the rows that are
sampled are greedy and must be the largest logit, the others must be among the top k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.bench.gpu_work import Call, GpuWork, Margin, margin, normal, poisoned

_SETS = 8
_CHECKED_TOKENS = 4
_TOP_K = 50


def build_moe(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """tokens, experts, chosen, dim, inner, dtype."""
    from headrace.ops import moe
    from headrace.ops.select import placed

    tokens, dim, inner, dtype = sizes["tokens"], sizes["dim"], sizes["inner"], sizes["dtype"]
    x = normal((tokens, dim), dtype, device, 0)
    gate, up = (normal((sizes["experts"], inner, dim), dtype, device, seed).mul_(dim**-0.5) for seed in (1, 2))
    down = normal((sizes["experts"], dim, inner), dtype, device, 3).mul_(inner**-0.5)
    logits = [normal((tokens, sizes["experts"]), "float32", device, 10 + s) for s in range(_SETS)]
    routings = [moe.Routing(*_top(each, sizes["chosen"])) for each in logits]

    def call(kernel: str, number: int, out: Any = None) -> Any:
        return moe.mixture_of_experts(x, gate, up, down, routings[number], kernel=kernel, out=out)

    def check(kernel: str) -> Margin:
        got = call(kernel, 0, poisoned(x.shape, dtype, device))[:_CHECKED_TOKENS]
        some, matrices = x[:_CHECKED_TOKENS], (gate, up, down)
        exact, plain = (_mixed(some, matrices, routings[0], narrow=narrow) for narrow in (False, True))
        return margin([got], [exact], [plain], dtype)

    arrays = {"x": x, "gate": gate, "up": up, "down": down}
    arrays |= {"experts": routings[0].experts, "weights": routings[0].weights}
    dtypes = {name: str(array.dtype).removeprefix("torch.") for name, array in arrays.items()} | {"out": dtype}
    request = placed(moe.request({name: tuple(array.shape) for name, array in arrays.items()}, dtypes), x)
    traffic = request.traffic
    return GpuWork(traffic.num_bytes, traffic.flops, traffic.unit, moe.kernels(), request, call, _SETS, check)


def _top(logits: Any, chosen: int) -> tuple[Any, Any]:
    weights, experts = logits.softmax(dim=1).topk(chosen, dim=1)
    return experts.int(), weights / weights.sum(dim=1, keepdim=True)


def _mixed(x: Any, matrices: tuple[Any, Any, Any], routing: Any, *, narrow: bool) -> Any:
    """The formula of some tokens: in float64, or in float32 with what lies between rounded to x's type."""
    import torch

    dtype = torch.float32 if narrow else torch.float64
    total = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for token in range(len(x)):
        for expert, weight in zip(routing.experts[token].tolist(), routing.weights[token].to(dtype), strict=True):
            gate, up, down = (array[expert].to(dtype) for array in matrices)
            row = x[token].to(dtype)
            between = torch.nn.functional.silu(gate @ row) * (up @ row)
            total[token] += weight * (down @ (between.to(x.dtype).to(dtype) if narrow else between))
    return total


def build_sample(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """rows, vocab: draws without penalties, every second one greedy."""
    import torch

    from headrace.config import SamplingParams
    from headrace.ops import sampling
    from headrace.ops.select import placed

    rows, vocab = sizes["rows"], sizes["vocab"]
    logits = [normal((rows, vocab), "float32", device, s).mul_(3) for s in range(_SETS)]
    params = [SamplingParams(temperature=0.8 * (i % 2), top_k=_TOP_K, top_p=0.95) for i in range(rows)]
    told = [torch.from_numpy(one).to(device) for one in sampling.settings(params, range(rows), [0] * rows)]
    out = torch.empty(rows, dtype=torch.int32, device=device)
    kernels = {kernel.name: kernel for kernel in sampling.kernels()}

    def call(kernel: str, number: int) -> Any:
        kernels[kernel].run(logits[number], told, None, out)
        return out

    def check(kernel: str) -> Margin:
        out.fill_(-2)
        return Margin(_misses(call(kernel, 0), logits[0]), 0.0)

    def torchs() -> Call:
        return lambda number: torch.multinomial(logits[number].softmax(dim=1), 1)

    request = placed(sampling.request((rows, vocab), "float32"), logits[0])
    of_call = (
        request.traffic.num_bytes,
        request.traffic.flops,
        request.traffic.unit,
        sampling.kernels(),
        request,
        call,
    )
    return GpuWork(*of_call, _SETS, check, {"torch softmax, multinomial": torchs})


def _misses(tokens: Any, logits: Any) -> float:
    """Rows whose token is not the largest logit, where they are greedy, or not among the top k."""
    import torch

    rows = torch.arange(len(logits), device=logits.device)
    inside = (tokens >= 0) & (tokens < logits.shape[1])
    taken = logits[rows, tokens.long().clamp(0, logits.shape[1] - 1)]
    best = logits.topk(min(_TOP_K, logits.shape[1]), dim=1).values
    least = torch.where(rows % 2 == 0, best[:, 0], best[:, -1])
    return float((~inside | (taken < least)).sum())


def build_logprobs(sizes: Mapping[str, Any], device: str) -> GpuWork:
    """rows, vocab, top: of a token of each row, and of so many of the likeliest."""
    import torch

    from headrace.ops import logprobs
    from headrace.ops.select import placed

    rows, vocab, top = sizes["rows"], sizes["vocab"], sizes["top"]
    logits = [normal((rows, vocab), "float32", device, s).mul_(3) for s in range(_SETS)]
    tokens = torch.arange(rows, dtype=torch.int32, device=device)
    ids = torch.empty((rows, top), dtype=torch.int32, device=device)
    out = [poisoned((rows,), "float32", device), ids, poisoned((rows, top), "float32", device)]
    kernels = {kernel.name: kernel for kernel in logprobs.kernels()}

    def call(kernel: str, number: int) -> Any:
        kernels[kernel].run(logits[number], tokens, *out)
        return out

    def check(kernel: str) -> Margin:
        got, _, likeliest = call(kernel, 0)
        exact, plain = (logits[0].to(dtype).log_softmax(dim=1) for dtype in (torch.float64, torch.float32))
        own, best = torch.arange(rows, device=device), exact.topk(top, dim=1).indices
        told = [[x[own, own], x.gather(1, best)] for x in (exact, plain)]
        return margin([got, likeliest], told[0], told[1], "float32")

    def torchs() -> Call:
        return lambda number: logits[number].log_softmax(dim=1).topk(top, dim=1)

    request = placed(logprobs.request((rows, vocab), top), logits[0])
    traffic, peers = request.traffic, {"torch log_softmax, topk": torchs}
    of_call = (traffic.num_bytes, traffic.flops, traffic.unit, logprobs.kernels(), request, call)
    return GpuWork(*of_call, _SETS, check, peers)
