"""The documents' curl commands and Python, as they stand, on a service with the bundled model."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.docs.documents import DOCUMENTS, ROOT, Block, blocks
from tests.serving import CLIP, PATIENCE_S

PUBLISHED = "http://127.0.0.1:8000"


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
    with CLIP.open("rb") as clip:
        uploaded = httpx.post(f"{url}/v1/videos", files={"video": clip}, timeout=PATIENCE_S)
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


def python_blocks() -> list[Any]:
    return [
        pytest.param(block.text, id=f"{document.relative_to(ROOT)}-{number}")
        for document in DOCUMENTS
        for number, block in enumerate(blocks(document))
        if block.language == "python"
    ]


@pytest.mark.parametrize("source", python_blocks())
def test_python_runs_and_prints(source: str, url: str) -> None:
    with CLIP.open("rb") as clip:
        uploaded = httpx.post(f"{url}/v1/videos", files={"video": clip}, timeout=PATIENCE_S)
    assert PUBLISHED in source and "vid_..." in source
    source = source.replace(PUBLISHED, url).replace("vid_...", uploaded.json()["video_id"])
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    assert "'policy': 'dycoke'" in done.stdout and "'k': 0.5" in done.stdout


def names_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from names_in(inner)
