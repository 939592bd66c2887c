"""POST /v1/embeddings: texts as vectors of length 1, out of the model's last hidden states.

pooling: "mean" of all tokens (the default) or the "last" token's. Models that were not trained for it give vectors that
compare texts roughly.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any, ClassVar, Literal

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request

from headrace.server.generation import server_of, unless_gone
from headrace.server.problems import Problem, problem_of, renamed, unsupported
from headrace.server.protocol import Body, Refused, StrictRoute
from headrace.server.registry import ServedModel
from headrace.text.tokenizer import Tokenizer

router = APIRouter(route_class=StrictRoute)
_MOST_INPUTS = 2048


class EmbeddingRequest(Body):
    """OpenAI's fields, and pooling. input: text or token ids, or a list of either."""

    refused: ClassVar[Refused] = {}

    model: str
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
    pooling: Literal["mean", "last"] = "mean"

    @property
    def inputs(self) -> list[Any]:
        if isinstance(self.input, str) or (self.input and isinstance(self.input[0], int)):
            return [self.input]
        return list(self.input)


@router.post("/v1/embeddings")
async def create_embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
    """A vector for each text."""
    if not 0 < len(body.inputs) <= _MOST_INPUTS:
        raise Problem(400, f"input: expected 1 to {_MOST_INPUTS} texts", param="input", code="invalid_value")
    model = await server_of(request).models.acquire(body.model)
    try:
        return await unless_gone(request, _embedded(body, model))
    except Exception as error:
        raise renamed(problem_of(error), {"prompt": "input", "text": "input"}) from error
    finally:
        model.release()


async def _embedded(body: EmbeddingRequest, model: ServedModel) -> dict[str, Any]:
    llm = model.loaded
    if body.dimensions not in (None, llm.llm.config.dim):
        raise unsupported("dimensions", f"the model has {llm.llm.config.dim}")
    ids = await asyncio.to_thread(_tokens, body.inputs, llm.llm.tokenizer)
    data = []
    for index, each in enumerate(ids):
        vector = await llm.embed(each, body.pooling)
        if not np.isfinite(vector).all():
            raise Problem(500, f"input[{index}]: the model computes no finite numbers of it", code="not_finite")
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        shown = vector.tolist()
        if body.encoding_format == "base64":
            shown = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    count = sum(map(len, ids))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


def _tokens(inputs: list[Any], tokenizer: Tokenizer) -> list[list[int]]:
    # What is to be embedded is text, whatever it spells.
    return [tokenizer.encode(text, parse_special=False) if isinstance(text, str) else text for text in inputs]
