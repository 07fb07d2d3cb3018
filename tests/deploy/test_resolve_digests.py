"""Digests of images, from a registry that asks readers for a token."""

import sys
from pathlib import Path

import httpx
import pytest

from deploy import resolve_digests
from deploy.resolve_digests import DOCKER_HUB, images, main

DIGEST = "sha256:" + "0a" * 32


class Registry:
    """Answers like Docker Hub."""

    def __init__(self) -> None:
        self.digest = DIGEST
        self.asked: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == "auth.example":
            assert request.url.params["service"] == "registry.example"
            return httpx.Response(200, json={"token": "let-me-read"})
        if request.headers.get("authorization") != "Bearer let-me-read":
            challenge = 'Bearer realm="https://auth.example/token",service="registry.example"'
            return httpx.Response(401, headers={"www-authenticate": challenge})
        assert request.method == "HEAD" and "index" in request.headers["accept"]
        self.asked.append(request.url.path)
        return httpx.Response(200, headers={"docker-content-digest": self.digest})

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=DOCKER_HUB, transport=httpx.MockTransport(self))


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", ["resolve_digests"])
    monkeypatch.setattr(resolve_digests, "OUTPUT", tmp_path / "digests.env")
    return tmp_path / "digests.env"


def test_digests_are_written_as_the_compose_file_takes_them(output: Path) -> None:
    registry = Registry()
    assert main(registry.client()) == 0
    wanted = {image.variable: f"@{DIGEST}" for image in images()}
    lines = [line.split("  #")[0] for line in output.read_text().splitlines()]
    assert dict(line.split("=", 1) for line in lines) == wanted and len(wanted) == 4
    assert any(path.startswith("/v2/library/redis/manifests/") for path in registry.asked)
    assert any(path.startswith("/v2/grafana/grafana/manifests/") for path in registry.asked)


def test_a_tag_that_has_moved_fails_the_check(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry()
    assert main(registry.client()) == 0
    monkeypatch.setattr(sys, "argv", ["resolve_digests", "--check"])
    assert main(registry.client()) == 0
    registry.digest = "sha256:" + "0b" * 32
    assert main(registry.client()) == 1
    assert "0b0b" in capsys.readouterr().out and "0b0b" not in output.read_text()


@pytest.mark.parametrize("reply", [httpx.Response(404), httpx.Response(200), httpx.Response(401)])
def test_a_registry_that_does_not_say_leaves_the_file_as_it_was(
    output: Path, reply: httpx.Response, capsys: pytest.CaptureFixture[str]
) -> None:
    transport = httpx.MockTransport(lambda request: reply)
    assert main(httpx.Client(base_url=DOCKER_HUB, transport=transport)) == 1
    assert "library/python" in capsys.readouterr().err and not output.exists()
