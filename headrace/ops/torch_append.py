"""Writing to the pages of a cache as an operator of torch that changes its arguments: torch.compile keeps the order.

torch.ops.headrace.append_pages is `headrace.ops.append_pages` and `append_latent_pages` both. It changes the pages,
their scales, and `query`, rotated in place; where callers want that elsewhere, it is a copy. Scales count as changed
even where they are the caller's and only read. There is no gradient: pages to learn from are filled by index_put.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from headrace.ops import page_append
from headrace.ops.torch_autograd import new_operator
from headrace.ops.torch_operands import tensor_of

_CHANGED = ("key_pages", "value_pages", "query", "key_scales", "value_scales")
_GIVEN = ("key", "key_pages", "slots")  # the others may be None
_TENSORS = (*_GIVEN, "value", "latent", "value_pages", "query", "table", "query_norm", "key_norm", *_CHANGED[3:])


def append(given: Mapping[str, Any], *, kernel: str | None, **options: Any) -> Any:
    """The rotated queries; `given`: arrays that torch must see, options: those of `page_append.run`."""
    if torch.is_grad_enabled():
        _refuse_gradients(given)
    query: Any = given.get("query")
    out: Any = given.get("out")
    if query is None or out is None or out is query:
        place = query
    else:  # not rounded before it is rotated
        place = query.to(torch.promote_types(query.dtype, out.dtype), copy=True)
    arrays = [tensor_of(name, place if name == "query" else given.get(name)) for name in _TENSORS]
    torch.ops.headrace.append_pages.default(*arrays, **options, kernel_name=kernel)
    return place if place is query else out.copy_(place)


def _refuse_gradients(given: Mapping[str, Any]) -> None:
    for name in _TENSORS:
        if getattr(given.get(name), "requires_grad", False):
            text = f"{name}: append_pages has no gradient; detach it, or fill pages by torch's index_put"
            raise NotImplementedError(text)


def _schema() -> str:
    tensors = []
    for name, letter in zip(_TENSORS, "abcdefghijklmnop", strict=False):
        kind = f"Tensor({letter}!)" if name in _CHANGED else "Tensor"
        tensors.append(f"{kind}{'' if name in _GIVEN else '?'} {name}")
    return f"({', '.join(tensors)}, *, bool interleaved, float eps, bool spread, str? kernel_name) -> ()"


def _run(*tensors: Any, kernel_name: str | None, **options: Any) -> None:
    page_append.run(dict(zip(_TENSORS, tensors, strict=True)), kernel=kernel_name, **options)


def _fake(*tensors: Any, **options: Any) -> None:
    given = dict(zip(_TENSORS, tensors, strict=True))
    for name in ("value", "latent", "query", "slots"):
        rows = given[name]
        torch._check(rows is None or rows.shape[0] == given["key"].shape[0], lambda: "rows: expected one per token")


new_operator("append_pages", _run, _schema(), _fake, mutates=_CHANGED)
