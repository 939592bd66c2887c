"""Random weight matrices in every format, as the bytes a file would hold."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from headrace.ops.formats import FORMATS

# Where the fp16 scales and mins lie in a block; all other bytes may be anything.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def random_matrix(name: str, rows: int, cols: int, random: np.random.Generator) -> np.ndarray:
    """uint8 [rows, row_bytes]: normal values for float formats, random codes under normal scales for quantized ones."""
    if name in FLOATS:
        return random.standard_normal((rows, cols)).astype(FLOATS[name]).view(np.uint8).reshape(rows, -1)
    block = FORMATS[name]
    blocks = random.integers(0, 256, (rows, cols // block.block_len, block.block_bytes), dtype=np.uint8)
    for offset in HALVES[name]:
        scale = (0.05 * random.standard_normal(blocks.shape[:2])).astype(np.float16)
        blocks[:, :, offset : offset + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)
