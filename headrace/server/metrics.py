"""Figures for Prometheus, under the names that dashboards for vLLM know."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from headrace.server.registry import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)


class Metrics:
    """Counters and histograms of one server; gauges are read from the engines when somebody asks."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self.registry = CollectorRegistry()
        self.first_token = self._histogram("time_to_first_token_seconds", "Until the first token.", _FIRST_TOKEN_S)
        self.request = self._histogram("e2e_request_latency_seconds", "Of a whole request.", _REQUEST_S)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self.hits = self._counter("prefix_cache_hits", "Prompt tokens found there.")
        self.drafts = self._counter("spec_decode_num_drafts", "Times that tokens were guessed for an answer.")
        self.guessed = self._counter("spec_decode_num_draft_tokens", "Tokens guessed.")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Guesses that were right.")
        self.accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Right guesses by their place.", "position"
        )
        self.finished = self._counter("request_success", "Answers by how they ended.", "finished_reason")
        self.tallies: defaultdict[str, Tally] = defaultdict(Tally)  # by the model's name
        self.registry.register(_Tallies(models, self.tallies))
        self.registry.register(_Gauges(models))

    def text(self) -> bytes:
        """All of them, as Prometheus reads it."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", about, ["model_name"], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", about, ["model_name", *labels], registry=self.registry)


class Tally:
    """A model's tokens and the times between them. Plain numbers: every token changes them."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.between_s = 0.0
        self.num_between = [0] * (len(_TOKEN_S) + 1)  # by the bucket they are in, the last without an end

    def observe(self, seconds: float, count: int) -> None:
        """So many tokens came at once, so long after those before: each took its share."""
        self.between_s += seconds
        self.num_between[bisect_left(_TOKEN_S, seconds / count)] += count


class _Tallies:
    """Tells of tallies as Prometheus wants it: each bucket holds those before it. Of loaded models even of none."""

    def __init__(self, models: Iterable[ServedModel], tallies: Mapping[str, Tally]) -> None:
        self._models, self._tallies = models, tallies

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily("vllm:generation_tokens", "Tokens of answers.", labels=["model_name"])
        between = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Between two tokens.", labels=["model_name"]
        )
        bounds = [floatToGoString(bound) for bound in (*_TOKEN_S, float("inf"))]
        loaded = {model.name: Tally() for model in self._models if model.llm is not None}
        for name, tally in (loaded | dict(self._tallies)).items():
            tokens.add_metric([name], tally.num_tokens)
            buckets = list(zip(bounds, accumulate(tally.num_between), strict=True))
            between.add_metric([name], buckets, tally.between_s)
        yield from (tokens, between)


class _Gauges:
    """Reads engines while they run: whole numbers, each right at some moment."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models = models

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Requests in steps.", labels=["model_name"])
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait.", labels=["model_name"])
        used = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of pages in use, 0 to 1.", labels=["model_name"])
        preempted = GaugeMetricFamily("vllm:num_preemptions", "Requests put back.", labels=["model_name"])
        for model in self._models:
            if model.llm is None:
                continue
            engine, name = model.llm.worker.engine, [model.name]
            running.add_metric(name, len(engine.scheduler.running))
            waiting.add_metric(name, max(0, model.llm.num_requests - len(engine.scheduler.running)))
            held = engine.pool.num_pages - engine.pool.num_free - engine.pool.num_spare
            used.add_metric(name, max(0.0, held / engine.pool.num_pages))
            preempted.add_metric(name, engine.scheduler.num_preemptions)
        yield from (running, waiting, used, preempted)
        yield from self._steps()

    def _steps(self) -> Iterator[Metric]:
        """What steps have taken; asked for on the event loop, whose own time is one of them."""
        steps = CounterMetricFamily("headrace:engine_steps", "Steps of the engine.", labels=["model_name"])
        whole = CounterMetricFamily("headrace:engine_step_seconds", "What they took.", labels=["model_name"])
        native = CounterMetricFamily("headrace:engine_native_seconds", "Computing in them.", labels=["model_name"])
        for model in self._models:
            if model.llm is not None:
                engine, name = model.llm.worker.engine, [model.name]
                steps.add_metric(name, engine.num_steps)
                whole.add_metric(name, engine.busy_s)
                native.add_metric(name, engine.runner.native_s)
        loop = CounterMetricFamily("headrace:event_loop_cpu_seconds", "CPU of text and HTTP.", value=time.thread_time())
        clock = GaugeMetricFamily("headrace:clock_seconds", "The server's clock now.", value=time.perf_counter())
        yield from (steps, whole, native, loop, clock)
