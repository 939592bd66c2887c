"""The models a server has: loaded when they are first asked for, unloaded when nobody has for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from pathlib import PurePath

from headrace.async_llm import AsyncLLM
from headrace.errors import ArgumentError
from headrace.server.problems import Problem

Load = Callable[[str], AsyncLLM]


class ServedModel:
    """A model by its name in the API. `llm` is there while it is loaded, `num_users` are requests that need it."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source
        self.created = int(time.time())
        self.llm: AsyncLLM | None = None
        self.num_users = 0
        self.failed = False  # to load, the last time
        self.used_s = time.monotonic()
        self.loading = asyncio.Lock()

    @property
    def loaded(self) -> AsyncLLM:
        assert self.llm is not None, "used without acquire"
        return self.llm

    def release(self) -> None:
        """Ends a use that `Registry.acquire` began."""
        self.num_users -= 1
        self.used_s = time.monotonic()


class Registry:
    """Models by name. load: makes one of its source, in a thread."""

    def __init__(self, sources: Iterable[str], load: Load) -> None:
        self._load = load
        self._models: dict[str, ServedModel] = {}
        for text in sources:
            name, source = _name_of(text)
            if name in self._models:
                raise ArgumentError(f"model: two are called {name!r}", "name one: -m other=path/to/file.gguf")
            self._models[name] = ServedModel(name, source)
        if not self._models:
            raise ArgumentError("model: expected at least one")

    def __iter__(self) -> Iterable[ServedModel]:  # type: ignore[override]
        return iter(list(self._models.values()))

    @property
    def first(self) -> ServedModel:
        """The one that is loaded at the start."""
        return next(iter(self._models.values()))

    @property
    def loaded(self) -> list[ServedModel]:
        return [model for model in self._models.values() if model.llm is not None]

    def find(self, name: str) -> ServedModel:
        """The model of this name; 404 where there is none."""
        model = self._models.get(name)
        if model is None:
            known = ", ".join(self._models)
            raise Problem(
                404, f"model: {name[:100]!r} does not exist, there is {known}", param="model", code="model_not_found"
            )
        return model

    async def acquire(self, name: str) -> ServedModel:
        """The model, loaded, and kept so until `release`."""
        model = self.find(name)
        model.num_users += 1
        try:
            async with model.loading:
                if model.llm is None:
                    model.failed = True  # until it is there
                    model.llm = await asyncio.to_thread(self._load, model.source)
                    model.failed = False
        except BaseException:
            model.release()
            raise
        return model

    async def unload_idle(self, idle_s: float) -> None:
        """Unloads what has not been used for so long, again and again."""
        while True:
            await asyncio.sleep(min(idle_s / 4, 10.0))
            for model in self.loaded:
                if not model.num_users and time.monotonic() - model.used_s >= idle_s:
                    await self._unload(model)

    async def drain(self, timeout_s: float) -> bool:
        """Lets what runs end, and stops what takes longer. Whether all ended."""
        ended = await asyncio.gather(*(model.loaded.drain(timeout_s) for model in self.loaded))
        return all(ended)

    async def close(self) -> None:
        """Unloads everything."""
        for model in self.loaded:
            await self._unload(model)

    async def _unload(self, model: ServedModel) -> None:
        async with model.loading:
            if model.llm is not None:
                llm, model.llm = model.llm, None
                await asyncio.to_thread(llm.close)


def _name_of(text: str) -> tuple[str, str]:
    """Name and source of "name=source", or of a source alone: a file is called by its name without the ending."""
    name, equals, source = text.partition("=")
    if equals and source and not source.startswith("=") and "/" not in name and ":" not in name:
        return name, source
    is_file = text.endswith(".gguf")
    return (PurePath(text).stem if is_file else text), text
