"""sample(logits [rows, vocab], params [rows]) -> token ids [rows]

    x = logits; of each token seen in prompt or answer: x / repetition where x > 0, x * repetition elsewhere
    x = x - presence * (count > 0) - frequency * count      count: how often the token is in the answer
    greedy (temperature 0): the largest x, of equal ones the lowest id
    p = e^((x - max x) / temperature), tokens in the order of falling x, equal ones of rising id:
      top_k: the first k;  top_p: of those the shortest beginning with top_p of their weight;  min_p: p >= min_p
    typical_p: what is left, in the order of rising |log p - mean of log p|, equal ones of rising id: of those again the
      shortest beginning with typical_p of their weight
    the token: the first, by id, where the sum of what is kept exceeds u of its total;  u = uniform(seed, step)

The draw is counter-based: nothing but the row's own logits, parameters, seed and step decides its token.
Top-p: Holtzman et al. 2020. Min-p: Nguyen et al. 2024. Typical: Meister et al. 2023. Repetition penalty: Keskar et
al. 2019.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from headrace.config import SamplingParams
from headrace.errors import ArgumentError
from headrace.kernels.arrays import dtype_name, empty_like, shape_of
from headrace.ops import gpu_rows
from headrace.ops.late import late
from headrace.ops.per_isa import per_isa
from headrace.ops.select import Kernel, Request, Traffic, choose, placed

TokenIds = Sequence[Sequence[int]]
FLOPS_PER_LOGIT = 20  # the exponential's
NOT_DRAWN = -1  # the step of a row of `sample_rows` whose token nobody wants
NO_TOKEN = -1  # what `sample_rows` draws from a row with NaN or +inf, or with nothing above -inf


def sample(
    logits: Any,
    params: Sequence[SamplingParams],
    *,
    seeds: Sequence[int],
    steps: Sequence[int],
    prompt_ids: TokenIds | None = None,
    answer_ids: TokenIds | None = None,
    kernel: str | None = None,
) -> Any:
    """Token ids, int32 [rows], one for each row of logits: of NumPy, or on the GPU that holds the logits.

    logits: [rows, vocab] float32; -inf excludes a token. params, seeds and steps: one per row; `params[i].seed` is not
    looked at. prompt_ids, answer_ids: what each row has seen, for the penalties; not read without them. Raises
    ArgumentError when a row holds NaN or +inf or nothing above -inf, and for numbers out of range. A GPU is not waited
    for: there such a row draws NO_TOKEN.
    """
    shape = shape_of(logits, "logits")
    asked = placed(request(shape, dtype_name(logits)), logits)
    _check(asked, params=params, seeds=seeds, steps=steps, prompt_ids=prompt_ids, answer_ids=answer_ids)
    counts = token_counts(params, prompt_ids, answer_ids)
    out: Any = np.empty(len(params), np.int32) if asked.device == "cpu" else empty_like(logits, shape[:1], "int32")
    choose(kernels(), asked, kernel).run(logits, settings(params, seeds, steps), counts, out)
    if asked.device != "cpu":
        return out
    for row in np.flatnonzero(out == NO_TOKEN).tolist():
        seen = [ids[row] if ids is not None else () for ids in (prompt_ids, answer_ids)]
        with np.errstate(all="ignore"):
            _refuse(penalized(np.asarray(logits)[row], params[row], *seen), row)
    return out


def sample_rows(logits: Any, settings: Sequence[Any], out: Any) -> None:
    """The draws without penalties, as an op of a program: when it runs, the ids of the logits' rows go to `out`.

    settings: as `settings` makes them, on a GPU tensors of these, read at each run; a row whose step is NOT_DRAWN is
    left out. What `sample` refuses draws NO_TOKEN: one row must not end the step of the others.
    """
    asked = placed(request(shape_of(logits, "logits"), dtype_name(logits)), logits)
    choose(kernels(), asked).run(logits, settings, None, out)


def settings(params: Sequence[SamplingParams], seeds: Sequence[int], steps: Sequence[int]) -> list[np.ndarray]:
    """The rows' numbers as kernels read them: reals [rows, 7] float64 and integers [rows, 3] int64."""
    reals = [
        (p.temperature, p.top_p, p.min_p, p.typical_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        for p in params
    ]
    integers = [(p.top_k, seed, step) for p, seed, step in zip(params, seeds, steps, strict=True)]
    return [np.array(reals, np.float64).reshape(-1, 7), np.array(integers, np.int64).reshape(-1, 3)]


def token_counts(
    params: Sequence[SamplingParams], prompt_ids: TokenIds | None, answer_ids: TokenIds | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(ids, counts, starts): the ids each row has seen, rising; how often in its answer; where each row begins.

    None when no row has a penalty, or nothing was seen.
    """
    if not any(map(is_penalized, params)) or (prompt_ids is None and answer_ids is None):
        return None
    ids, counts, starts = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [0]
    for row, param in enumerate(params):
        if is_penalized(param):
            prompt = np.asarray(prompt_ids[row] if prompt_ids is not None else (), np.int32)
            answer = np.asarray(answer_ids[row] if answer_ids is not None else (), np.int32)
            seen, where = np.unique(np.concatenate([prompt, answer]), return_inverse=True)
            ids.append(seen)
            counts.append(np.bincount(where[len(prompt) :], minlength=len(seen)).astype(np.int32))
        starts.append(starts[-1] + (len(ids[-1]) if is_penalized(param) else 0))
    return np.concatenate(ids), np.concatenate(counts), np.array(starts, np.int32)


def is_penalized(params: SamplingParams) -> bool:
    """Whether a draw depends on the tokens seen before."""
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)


def reference(
    logits: np.ndarray,
    params: SamplingParams,
    prompt_ids: Sequence[int] = (),
    answer_ids: Sequence[int] = (),
    dtype: Any = np.float64,
) -> np.ndarray:
    """Probabilities [vocab] of one row, by sorting. Greedy: all of it on one token."""
    x = penalized(logits.astype(dtype), params, prompt_ids, answer_ids)
    if params.temperature == 0:
        return np.eye(1, len(x), int(np.argmax(x)), dtype=dtype)[0]
    weights = np.exp((x - x.max()) / dtype(params.temperature))
    order = np.argsort(-x, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1:
        sums = np.cumsum(weights[order])
        order = order[: np.searchsorted(sums, params.top_p * sums[-1]) + 1]
    kept = np.zeros_like(weights)
    kept[order] = np.where(weights[order] >= params.min_p, weights[order], 0)
    if params.typical_p < 1:
        kept = typical(kept, params.typical_p)
    return kept / kept.sum()


def typical(weights: np.ndarray, typical_p: float) -> np.ndarray:
    """Weights [vocab] of which the typical ones are left: those whose logarithm is nearest to its mean."""
    some = np.flatnonzero(weights)
    logs = np.log(weights[some])
    order = some[np.argsort(np.abs(logs - weights[some] @ logs / weights[some].sum()), kind="stable")]
    sums = np.cumsum(weights[order])
    kept = np.zeros_like(weights)
    inside = order[: np.searchsorted(sums, typical_p * sums[-1]) + 1]
    kept[inside] = weights[inside]
    return kept


def penalized(
    x: np.ndarray, params: SamplingParams, prompt_ids: Sequence[int], answer_ids: Sequence[int]
) -> np.ndarray:
    """Logits [vocab] with the three penalties."""
    seen = np.unique(np.array([*prompt_ids, *answer_ids], np.int64))
    count = np.bincount(np.array(answer_ids, np.int64), minlength=len(x))
    x = x.copy()
    x[seen] = np.where(x[seen] > 0, x[seen] / params.repetition_penalty, x[seen] * params.repetition_penalty)
    return x - (params.presence_penalty * (count > 0) + params.frequency_penalty * count).astype(x.dtype)


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1) of a draw, a multiple of 2^-53: Philox 4x32-10 of key `seed` and counter `step`."""
    words = philox((step & 0xFFFFFFFF, step >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


def derived_seed(seed: int, index: int) -> int:
    """The seed of answer number `index` of several to one prompt: the seed itself for the first, below 2^63.

    For the others the first 63 bits of Philox 4x32-10 of key `seed` and counter (index, 0, 0, 1), which no draw uses.
    """
    words = philox((index, 0, 0, 1), (seed & 0xFFFFFFFF, seed >> 32))
    return seed if index == 0 else (words[0] << 32 | words[1]) >> 1


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random words from four words and a key: Philox 4x32-10 of Salmon, Moraes, Dror and Shaw 2011."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (b >> 32 ^ counter[1] ^ key[0], b & 0xFFFFFFFF, a >> 32 ^ counter[3] ^ key[1], a & 0xFFFFFFFF)
        key = ((key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF)
    return counter


def logits_hash(logits: np.ndarray) -> str:
    """16 hexadecimal digits that tell apart logits differing in one bit: BLAKE2b of their float32 bytes."""
    values = np.ascontiguousarray(logits, dtype="<f4")
    return hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()


def request(shape: tuple[int, ...], dtype: str = "float32") -> Request:
    """The request of a call, from its shape alone: every logit is read once."""
    elements = math.prod(shape)
    traffic = Traffic(4 * elements, FLOPS_PER_LOGIT * elements)
    return Request("sample", {"logits": shape}, {"logits": dtype}, traffic)


def _refuse(row: np.ndarray, number: int) -> NoReturn:
    """Says why nothing can be drawn from a row."""
    bad = np.flatnonzero(~(row < np.inf))
    if bad.size:
        expected, got = "finite numbers or -inf", f"{row[bad[0]]} at token {bad[0]}"
    else:
        expected, got = "a token that is not -inf", "none"
    raise ArgumentError(f"logits: expected {expected}, got {got} in row {number}")


def _check(asked: Request, **rows: Sequence[Any] | None) -> None:
    shape = asked.shapes["logits"]
    if len(shape) != 2 or shape[1] < 1:
        raise ArgumentError(f"logits: expected [rows, vocab] with vocab >= 1, got {list(shape)}", "logits[None]")
    if asked.dtypes["logits"] != "float32":
        raise ArgumentError(f"logits: expected float32, got {asked.dtypes['logits']}")
    for name, values in rows.items():
        if values is not None and len(values) != shape[0]:
            raise ArgumentError(f"{name}: expected {shape[0]}, one per row of logits, got {len(values)}")
    for name in ("seeds", "steps"):
        for value in rows[name] or ():
            if not 0 <= value < 2**63:
                raise ArgumentError(f"{name}: expected whole numbers in 0..2^63-1, got {value}")


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of this op, imported when first run."""
    return *gpu_rows.sampling_kernels(), *per_isa(late("headrace.kernels.cpu.sampling"))
