"""Runs batches up to the last norm: the decoder without its head, for embeddings, over the pages of a runner."""

from __future__ import annotations

import numpy as np

from headrace.config import EngineConfig, ModelConfig
from headrace.engine.batch import Batch
from headrace.kernels.cpu import _native as native
from headrace.kv_cache.pages import pages_needed
from headrace.kv_cache.storage import Storage
from headrace.models import decoder
from headrace.models.layers import ModelWeights


class Embedder:
    """Hidden states of all tokens of a chunk, of one text at a time."""

    def __init__(
        self, weights: ModelWeights, config: ModelConfig, engine: EngineConfig, pool: native.Pool, storage: Storage
    ) -> None:
        tokens = engine.chunk_len
        max_pages = pages_needed(engine.context_len or config.context_len, engine.page_size)
        self.batch = Batch(tokens, 1, tokens, max_pages, engine.page_size)
        self.program = native.Program(pool, native.Sizes(tokens, 1, tokens))
        inputs, require = self.batch.inputs(self.program), engine.required
        recorded = decoder.hidden(inputs, weights, storage.layers, config, require=require)
        self.program.keep(recorded.tensor)
        self.program.finish()
        self._hidden = recorded.tensor.numpy()

    def run(self) -> np.ndarray:
        """Runs the batch as it stands; hidden states [outputs, dim], valid until the next run."""
        self.program.run(self.batch.sizes)
        return self._hidden[: self.batch.num_outputs]
