"""Errors that the framework would answer in its own way are problems like all others."""

import pytest

from tests.integration.api import (
    RunningApi,
    ScriptedWorker,
)


async def test_unknown_routes_and_methods_are_problems(api: RunningApi) -> None:
    missing = await api.client.get("/nowhere")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    wrong = await api.client.put("/v1/video/chat")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    for response in (missing, wrong):
        assert response.headers["content-type"] == "application/problem+json"


async def test_unexpected_error_is_a_500_without_its_text(
    api: RunningApi,
    worker: ScriptedWorker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(api.api.registry, "cards", fail, raising=True)
    response = await api.client.get("/readyz")
    assert response.status_code == 500
    problem = response.json()
    assert problem["code"] == "internal_error"
    assert "secret" not in response.text
    assert problem["incident"] in {getattr(r, "incident", None) for r in caplog.records}
