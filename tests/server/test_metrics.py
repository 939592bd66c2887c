"""/metrics: tokens, the times between them, and what guesses came to, in the names of vLLM's dashboards."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

Open = Callable[..., TestClient]


def values(client: TestClient, name: str) -> dict[str, float]:
    """A counter's values by the place that they are of."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == f"vllm:{name}_total"]
    return {sample.labels.get("position", ""): sample.value for sample in samples}


def test_accepted_lengths_are_told(client: TestClient) -> None:
    asked = {"model": "tiny", "prompt": "to be or not " * 12, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json={**asked, "speculate": 5})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 200
    [drafts], [guessed], [accepted] = (
        values(client, f"spec_decode_num_{name}").values() for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    by_place = values(client, "spec_decode_num_accepted_tokens_per_pos")
    assert 0 < drafts <= guessed <= 5 * drafts and sum(by_place.values()) == accepted <= guessed
    assert list(by_place.values()) == sorted(by_place.values(), reverse=True)


def test_every_token_is_counted_and_timed(client: TestClient) -> None:
    def told() -> tuple[float, float, list[float]]:
        families = text_string_to_metric_families(client.get("/metrics").text)
        [between] = [family for family in families if family.name == "vllm:inter_token_latency_seconds"]
        buckets = [sample.value for sample in between.samples if sample.name.endswith("_bucket")]
        [count] = [sample.value for sample in between.samples if sample.name.endswith("_count")]
        [seconds] = [sample.value for sample in between.samples if sample.name.endswith("_sum")]
        return count, seconds, buckets

    asked = {"model": "tiny", "prompt": "to be", "max_tokens": 60, "ignore_eos": True}
    client.post("/v1/completions", json=asked)
    [tokens], (count, seconds, _) = values(client, "generation_tokens").values(), told()
    for times in range(1, 51):  # an engine that is faster than its reader leaves no time between tokens
        client.post("/v1/completions", json=asked)
        [more_tokens], (more_count, more_seconds, buckets) = values(client, "generation_tokens").values(), told()
        assert more_tokens - tokens == 60 * times
        if more_count > count:
            break
    assert 0 < more_count - count < 60 * times  # the first ones came after nothing
    assert more_seconds > seconds and buckets == sorted(buckets) and buckets[-1] == more_count


def test_a_loaded_model_is_counted_from_nothing(open_client: Open) -> None:
    client, deadline = open_client(models=("other",)), monotonic() + 60
    while client.get("/health").status_code == 503 and monotonic() < deadline:
        sleep(0.01)
    assert list(values(client, "generation_tokens").values()) == [0]
