"""A plan: what the runs of a wrapper have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from headrace.compat.flashinfer.attend import Variant
from headrace.compat.flashinfer.batch import Batch

Own = TypeVar("Own", bound="Plan")


@dataclass(frozen=True)
class Plan:
    """The requests and the options of attention; out_dtype: of the result, None for the query's."""

    batch: Batch
    variant: Variant
    out_dtype: torch.dtype | None = None
    has_custom_mask: bool = False  # which takes causal's place

    def with_options(self: Own, **options: Any) -> Own:
        """The same with other options of attention."""
        if self.has_custom_mask:
            options.pop("causal", None)
        return replace(self, variant=replace(self.variant, **options))
