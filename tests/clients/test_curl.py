"""The curl binary."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import NUM_TOKENS, QUESTION
from tests.serving import CLIP


def curl(*words: str) -> str:
    done = subprocess.run(
        ["curl", "-sS", "--fail-with-body", "--max-time", "60", *words],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def chunks_of(stream: str) -> list[Any]:
    lines = [line for line in stream.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(chunks: list[Any]) -> str:
    return "".join(c["delta"]["content"] for chunk in chunks for c in chunk["choices"])


def test_a_streamed_completion(url: str, model: str, messages: list[Any], expected: Any) -> None:
    body = {"model": model, "messages": messages, "max_tokens": NUM_TOKENS, "stream": True}
    json_type = "Content-Type: application/json"
    stream = curl("-N", f"{url}/v1/chat/completions", "-H", json_type, "-d", json.dumps(body))
    assert text_of(chunks_of(stream)) == expected["text"]


@pytest.mark.parametrize("num_bytes", [0, 3 * 2**20])
def test_a_video_in_the_body_of_any_size(
    num_bytes: int, url: str, expected: Any, tmp_path: Path
) -> None:
    """Before a body of more than a megabyte, curl waits for `100 Continue`."""
    padding = (num_bytes + 8).to_bytes(4, "big") + b"free" + bytes(num_bytes)
    data = base64.b64encode(CLIP.read_bytes() + padding).decode()
    part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
    content = [part, {"type": "text", "text": QUESTION}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": NUM_TOKENS}
    path = tmp_path / "body.json"
    path.write_text(json.dumps(body))
    json_type = "Content-Type: application/json"
    answer = json.loads(
        curl(f"{url}/v1/chat/completions", "-H", json_type, "--data-binary", f"@{path}")
    )
    assert answer["choices"][0]["message"]["content"] == expected["text"]


def test_a_job_is_followed_from_any_event_on(url: str, expected: Any) -> None:
    form = ["-F", f"video=@{CLIP}", "-F", f"question={QUESTION}", "-F", f"max_tokens={NUM_TOKENS}"]
    stream = curl("-N", f"{url}/v1/video/chat", *form)
    ids = [line.removeprefix("id: ") for line in stream.splitlines() if line.startswith("id: ")]
    job_id = json.loads(stream.split("data: ", 1)[1].splitlines()[0])["job_id"]
    place = len(ids) // 2
    events = f"{url}/v1/jobs/{job_id}/events"
    rest = curl("-N", events, "-H", f"Last-Event-ID: {ids[place]}")
    assert [
        line.removeprefix("id: ") for line in rest.splitlines() if line.startswith("id: ")
    ] == ids[place + 1 :]
    assert json.loads(rest.rsplit("data: ", 1)[1])["text"] == expected["text"]
