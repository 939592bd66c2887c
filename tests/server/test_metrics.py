"""/metrics: what guesses came to, in the names of vLLM's dashboards."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient


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
