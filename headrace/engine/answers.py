"""Several answers to one prompt: the requests they are drawn by, and the likeliest of them.

The prompt is computed once. Each answer draws with a seed of its own, derived from the first one's and its number, so
answer i of n is the same whatever n is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headrace.config import SamplingParams
from headrace.engine.engine import Engine
from headrace.engine.logprobs import mean_logprob
from headrace.engine.request import Request
from headrace.ops.sampling import derived_seed
from headrace.token_rules import TokenRules


def answer_requests(
    engine: Engine, prompt_ids: Sequence[int], params: SamplingParams, rules: TokenRules | None = None
) -> list[Request]:
    """The requests of `best_of` (or `n`) answers; the others are copies of the first, which is the one to add.

    Raises what `Engine.request` raises.
    """
    count = params.best_of or params.n
    ranked = count > params.n and params.logprobs is None
    single = replace(params, n=1, best_of=None, logprobs=0 if ranked else params.logprobs)
    first = engine.request(prompt_ids, single, rules)
    copied = replace(single, prompt_logprobs=None)
    first.copies = [
        engine.request(prompt_ids, replace(copied, seed=derived_seed(first.seed, i)), rules) for i in range(1, count)
    ]
    return [first, *first.copies]


def likeliest(requests: Sequence[Request], count: int) -> list[Request]:
    """So many of the answers, the one with the highest mean logprob first where some are left out."""
    if len(requests) == count:
        return list(requests)
    return sorted(requests, key=lambda request: -mean_logprob(request.logprobs))[:count]
