"""Attention by its plain formula in torch, in the type of its arrays: the oracle of gradients, by autograd."""

import itertools

import numpy as np
import torch

from headrace.ops.attention_dense import rows_of, slopes_of
from headrace.ops.attention_formula import position_bias
from headrace.ops.attention_options import AttentionResult, checked_options


def attention(query, key, value, *, query_starts=None, key_starts=None, key_lens=None, sinks=None, **rest):
    """The arguments of ops.attention, floats alone."""
    bias = {name: rest.pop(name, None) for name in ("mask", "alibi_slopes")}
    options = checked_options(query.shape[-1], **rest)
    if query.dim() == 4:
        lens = [key.shape[1]] * len(query) if key_lens is None else key_lens.tolist()
        parts = [
            one(query[r], key[r, :count], value[r, :count], sinks, options, bias_of(bias, r, slice(None)))
            for r, count in enumerate(lens)
        ]
        return AttentionResult(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    key_starts = query_starts if key_starts is None else key_starts
    ends = key_starts[1:] if key_lens is None else key_starts[: len(key_lens)] + key_lens
    parts = [query.new_zeros(0, query.shape[1], value.shape[-1])], [query.new_zeros(0, query.shape[1])]
    for r, (rows, first, end) in enumerate(
        zip(itertools.pairwise(query_starts.tolist()), key_starts, ends, strict=False)
    ):
        own, keys = slice(*rows), slice(int(first), int(end))
        out, lse = one(query[own], key[keys], value[keys], sinks, options, bias_of(bias, r, own))
        parts[0].append(out)
        parts[1].append(lse)
    return AttentionResult(torch.cat(parts[0]), torch.cat(parts[1]))


def bias_of(bias, request, own):
    """The mask and the slopes of one request, as NumPy arrays."""
    mask, slopes = (None if array is None else array.float().numpy() for array in bias.values())
    if bias["mask"] is not None and bias["mask"].dtype == torch.bool:
        mask = mask.astype(bool)
    if mask is not None and own == slice(None):  # dense
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        mask = mask[request % len(mask)]
    elif mask is not None:
        mask = rows_of(mask, own)
    return {"mask": mask, "alibi_slopes": slopes_of(slopes, request)}


def one(query, keys, values, sinks, options, bias):
    """out [queries, heads, value_dim] and lse [queries, heads] of one request."""
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    added = torch.from_numpy(position_bias(len(query), len(keys), options, **bias)).to(query.dtype)
    seen = ~torch.isneginf(added)
    scores = options.scale * torch.einsum("qhd,khd->hqk", query, keys)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = torch.where(seen, scores + torch.where(seen, added, 0), -torch.inf)
    some = seen.any(-1, keepdim=True).expand(*scores.shape[:2], 1)
    scores = torch.where(some, scores, 0.0)
    lse = torch.logsumexp(scores, -1, keepdim=True) if len(keys) else scores.sum(-1, keepdim=True)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[:, None, None])
    weights = torch.where(some & seen, torch.exp(scores - total), 0)
    return torch.einsum("hqk,khd->qhd", weights, values), torch.where(some, lse, -torch.inf)[..., 0].T


def gradients(function, arrays, names, weights):
    """The result of the function, and the gradients of the named arrays of a weighted sum of out and lse."""
    leaves = {name: arrays[name].detach().clone().requires_grad_() for name in names}
    result = function(**{**arrays, **leaves})
    loss = (result.out * weights[0].to(result.out.dtype)).sum()
    if weights[1] is not None:
        loss = loss + (torch.where(torch.isneginf(result.lse), 0, result.lse) * weights[1].to(result.lse.dtype)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return result, dict(zip(names, found, strict=True))


def weights_for(shape, seed=0):
    """What the sum of `gradients` weighs out and lse by."""
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.standard_normal(shape)), torch.from_numpy(random.standard_normal(shape[:-1]))


def tensors(batch):
    """A batch of NumPy arrays and options as tensors and options."""
    return {name: tensor(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}


def tensor(array):
    if str(array.dtype) == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    if str(array.dtype) == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def as_type(arrays, dtype, names=("query", "key", "value", "sinks")):
    """The floats among the arrays in another type."""
    return {name: value.to(dtype) if name in names and value is not None else value for name, value in arrays.items()}


def numpy_of(array):
    return array.detach().to(torch.float64).numpy()
