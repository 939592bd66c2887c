"""Runs batches: the decoder and the draws recorded once into a native program, its cache, the logits it leaves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.config import EngineConfig, ModelConfig
from headrace.engine.batch import Batch
from headrace.engine.sampler import Sampler
from headrace.kernels.cpu import _native as native
from headrace.kv_cache.pages import pages_needed
from headrace.kv_cache.storage import allocate
from headrace.models import decoder
from headrace.models.layers import ModelWeights

MAX_OUTPUTS = 64  # rows of logits per step, of few requests: small beside the weights


class Runner:
    """One model on one pool of threads. Per step any number of tokens up to the chunk length, of any of the requests.

    num_pages: of the whole cache; a request has at most those that its context needs.
    """

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
        requests, tokens = engine.max_requests, max(engine.chunk_len, engine.max_requests)
        outputs = min(max(MAX_OUTPUTS, requests), tokens)
        max_pages = pages_needed(engine.context_len or config.context_len, engine.page_size)
        self.batch = Batch(tokens, requests, outputs, max_pages, engine.page_size)
        self.program = native.Program(pool, native.Sizes(tokens, requests, outputs))
        inputs, require = self.batch.inputs(self.program), engine.required
        recorded = decoder.logits(inputs, weights, self.storage.layers, config, require=require)
        self.program.keep(recorded.tensor)
        self.sampler = Sampler(recorded)
        self.program.finish()
        self._logits = recorded.tensor.numpy()
        self.native_s = 0.0  # of all runs together
        self.on_launch: Callable[[], None] | None = None  # as a run begins: other threads have time for Python now

    def run(self) -> np.ndarray:
        """Runs the batch as it stands and returns its logits [outputs, vocab], valid until the next run."""
        if self.on_launch is not None:
            self.on_launch()
        self.native_s += self.program.run(self.batch.sizes)
        return self._logits[: self.batch.num_outputs]

    def run_timed(self) -> list[tuple[str, float]]:
        """Runs the batch and returns each op's name and seconds."""
        return list(zip(self.program.op_names, self.program.run_timed(self.batch.sizes), strict=True))
