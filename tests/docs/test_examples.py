"""The documents' curl commands, sent as they stand to a service with the bundled model."""

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.docs.documents import DOCUMENTS, ROOT, Block, blocks
from tests.docs.service import PATIENCE_S, running_service

PUBLISHED = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_service(ROOT, {}) as url:
        yield url


def curl_blocks() -> list[Any]:
    return [
        pytest.param(block, id=f"{document.relative_to(ROOT)}-{number}")
        for document in DOCUMENTS
        for number, block in enumerate(blocks(document))
        if any(command.startswith("curl ") for command in block.commands)
    ]


def send(command: str, url: str, video_id: str) -> httpx.Response:
    """What curl would, of the options that the documents use."""
    words = iter(shlex.split(command.replace(PUBLISHED, url))[1:])
    target, body, method = "", None, None
    headers: dict[str, str] = {}
    fields: dict[str, str] = {}
    opened: dict[str, Any] = {}
    for word in words:
        if word == "-F":
            name, _, value = next(words).partition("=")
            if value.startswith("@"):
                opened[name] = (ROOT / value[1:]).read_bytes()
            else:
                fields[name] = value
        elif word == "-H":
            name, _, value = next(words).partition(":")
            headers[name] = value.strip()
        elif word == "-d":
            body = next(words).replace('"video_id": "..."', f'"video_id": "{video_id}"')
        elif word == "-X":
            method = next(words)
        elif word in ("-N", "-s", "-sN"):
            pass
        else:
            assert not word.startswith("-") and not target, f"what is {word}?"
            target = word
    method = method or ("POST" if fields or opened or body else "GET")
    with httpx.Client(timeout=PATIENCE_S) as client:
        return client.request(
            method,
            target,
            headers=headers,
            content=body,
            data=fields or None,
            files={name: ("clip.mp4", data) for name, data in opened.items()} or None,
        )


@pytest.mark.parametrize("block", curl_blocks())
def test_curl_commands_get_what_is_shown(block: Block, url: str) -> None:
    clip = (ROOT / "dycoke_core" / "tiny" / "clips" / "shapes.mp4").read_bytes()
    uploaded = httpx.post(f"{url}/v1/videos", files={"video": ("clip.mp4", clip)}, timeout=60)
    video_id = uploaded.json()["video_id"]
    shown_events = re.findall(r"^event: (\w+)$", block.text, flags=re.MULTILINE)
    for command in block.commands:
        if not command.startswith("curl "):
            continue
        response = send(command, url, video_id)
        assert response.is_success, response.text
        if not shown_events:
            assert response.json()
            continue
        events = re.findall(r"^event: (\w+)$", response.text, flags=re.MULTILINE)
        assert list(dict.fromkeys(e for e in events if e != "status")) == shown_events
        shown = re.findall(r'^data: \{"type":"(\w+)",(.*)$', block.text, flags=re.MULTILINE)
        sent = re.findall(r"^data: (\{.*\})$", response.text, flags=re.MULTILINE)
        by_type = {data["type"]: data for data in map(json.loads, sent)}
        for name, text in shown:
            assert set(re.findall(r'"(\w+)":', text)) <= set(names_in(by_type[name]))


def names_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from names_in(inner)
