"""What the OpenAPI document promises, tried by schemathesis: whatever it makes of it, no answer is a 5xx."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings


def test_nothing_that_the_document_allows_is_a_server_error(client: Any) -> None:
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) >= 12
    for operation in operations:
        _try(operation, client)


def _try(operation: Any, client: Any) -> None:
    @given(case=operation.as_strategy())
    @settings(
        max_examples=12, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    def check(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body = {**case.body, "model": "tiny"}
            case.body |= {"max_tokens": 2} if "max_tokens" in case.body else {}
        response = client.request(case.method, case.formatted_path, params=case.query, json=_json(case.body))
        assert response.status_code < 500, (case.method, case.path, case.body, response.text)

    check()


def _json(body: Any) -> Any:
    return body if isinstance(body, (dict, list, str, int, float, type(None))) else None
