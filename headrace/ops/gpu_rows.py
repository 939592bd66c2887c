"""The GPU kernels of what works row by row: norms, rotary positions, rows of tables, sampling, logprobs."""

from __future__ import annotations

from headrace.ops.per_gpu import GENERATION, gpu_kernel
from headrace.ops.select import Kernel, Plan, Reason, Request

# Of a row of logits: numbers of tokens, counted in int32, times segments.
MOST_LOGITS = 1 << 24
MOST_TOP = 128  # tokens told of a row: a program holds as many of every segment


def norm_kernels() -> tuple[Kernel, ...]:
    """rms_norm."""
    return (gpu_kernel("triton_norm", "headrace.kernels.triton.norm", _nothing, by_row),)


def quantized_norm_kernels() -> tuple[Kernel, ...]:
    """rms_norm into codes."""
    module = "headrace.kernels.triton.norm"
    return (gpu_kernel("triton_norm_quantized", module, _float8_codes, by_row, function="run_quantized"),)


def table_kernels() -> tuple[Kernel, ...]:
    """rope_table."""
    return (gpu_kernel("triton_rope", "headrace.kernels.triton.rope", _nothing, by_row, function="run_table"),)


def rotate_kernels() -> tuple[Kernel, ...]:
    """rotate."""
    return (gpu_kernel("triton_rope", "headrace.kernels.triton.rope", _nothing, by_row, function="run_rotate"),)


def row_kernels() -> tuple[Kernel, ...]:
    """embedding of floats, and select_rows."""
    return (gpu_kernel("triton_embedding", "headrace.kernels.triton.embedding", _unpacked, by_row),)


def sampling_kernels() -> tuple[Kernel, ...]:
    """sample."""
    return (gpu_kernel("triton_sampling", "headrace.kernels.triton.sampling", _vocabulary, by_row),)


def logprob_kernels() -> tuple[Kernel, ...]:
    """token_logprobs."""
    return (gpu_kernel("triton_logprobs", "headrace.kernels.triton.logprobs", _few_told, by_row),)


def by_row(request: Request, gpu: object) -> Plan:
    """Every row on its own, in an order that follows from its length."""
    return Plan(workers=getattr(gpu, "multiprocessors", 1), batch_invariant=True)


def converts_float8(arch: str) -> bool:
    """Whether that GPU, or the interpreter where there is none, has conversions to and from float8."""
    return not arch.startswith(("sm_80", "sm_86", "sm_87", "gfx90"))


def _nothing(request: Request) -> list[Reason]:
    return []


def _unpacked(request: Request) -> list[Reason]:
    if request.dtypes["table"] != "packed":
        return []
    return [Reason("table", "a packed weight", "an array of floats", "the matrix itself, on the GPU")]


def _vocabulary(request: Request) -> list[Reason]:
    vocab = request.shapes["logits"][1]
    return [Reason("vocab", str(vocab), f"at most {MOST_LOGITS}")] if vocab > MOST_LOGITS else []


def _few_told(request: Request) -> list[Reason]:
    told = request.shapes["top"][1]
    many = [Reason("num_top", str(told), f"at most {MOST_TOP}", "logits.topk")] if told > MOST_TOP else []
    return _vocabulary(request) + many


def _float8_codes(request: Request) -> list[Reason]:
    if request.dtypes["codes"] != "float8_e4m3fn" or converts_float8(request.arch):
        return []
    return [Reason(GENERATION, request.arch, "one that converts to float8", 'dtype="int8"')]
