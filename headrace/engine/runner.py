"""Runs batches: the decoder recorded once into a native program, the cache it works on, the logits it leaves."""

from __future__ import annotations

import numpy as np

from headrace.config import EngineConfig, ModelConfig
from headrace.engine.batch import Batch
from headrace.kernels.cpu import _native as native
from headrace.kv_cache.storage import allocate
from headrace.models import decoder
from headrace.models.layers import ModelWeights

MAX_OUTPUTS = 64  # rows of logits per step: enough for any decode batch, small beside the weights


class Runner:
    """One model on one pool of threads. Any number of tokens up to the chunk length per step."""

    def __init__(
        self,
        weights: ModelWeights,
        config: ModelConfig,
        engine: EngineConfig,
        pool: native.Pool,
        num_pages: int,
    ) -> None:
        self.config = config
        self.storage = allocate(config, num_pages=num_pages, page_size=engine.page_size, dtype=engine.kv_dtype)
        outputs = min(MAX_OUTPUTS, engine.chunk_len)
        self.batch = Batch(engine.chunk_len, 1, outputs, num_pages, engine.page_size)
        self.program = native.Program(pool, native.Sizes(engine.chunk_len, 1, outputs))
        recorded = decoder.logits(self.batch.inputs(self.program), weights, self.storage.layers, config)
        self.program.keep(recorded.tensor)
        self.program.finish()
        self._logits = recorded.tensor.numpy()

    def run(self) -> np.ndarray:
        """Runs the batch as it stands and returns its logits [outputs, vocab], valid until the next run."""
        self.program.run(self.batch.sizes)
        return self._logits[: self.batch.num_outputs]

    def run_timed(self) -> list[tuple[str, float]]:
        """Runs the batch and returns each op's name and seconds."""
        return list(zip(self.program.op_names, self.program.run_timed(self.batch.sizes), strict=True))
