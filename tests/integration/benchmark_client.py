"""`vllm bench serve --backend openai-chat`: what it sends, and how it reads a stream.

Written from the behaviour of vLLM's `benchmarks/lib/endpoint_request_func.py` and `serve.py` of
November 2026. The client comes with vLLM alone, whose installation wants a GPU's stack, so the
real one is not run here.

It reads packets, that is whatever the socket holds, and not events:

- white space at a packet's ends is cut off before the packet joins what is left of earlier ones;
- what comes before a blank line is a message; what is left over is one as soon as it begins with
  `data: ` and the rest is JSON or `[DONE]`;
- a message that begins with a colon is skipped (older releases stumble over it); of any other
  `data: ` is cut off, and the rest must be JSON;
- what has `choices` is timed as a token, else `usage` is read; a failure of any of this, or no
  token at all, fails the request.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

SEPARATOR = "\n\n"
PREFIX = "data: "
END = "[DONE]"


def payload(model: str, url: str, text: str, num_tokens: int, **extra: Any) -> dict[str, Any]:
    """Its body, with a dataset's video. `extra`: sampling parameters and `--extra-body`."""
    content = [
        {"type": "text", "text": text},
        {"type": "video_url", "video_url": {"url": url}},
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": num_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }


@dataclass
class Measurement:
    """What it knows of a request in the end."""

    text: str = ""
    num_timed: int = 0  # chunks that it took for tokens
    usage: dict[str, Any] = field(default_factory=dict)


def measure(packets: Iterable[bytes]) -> Measurement:
    """Raises: whatever would fail the request."""
    measurement = Measurement()
    for message in _messages(packets):
        if message.startswith(":") or message.removeprefix(PREFIX) == END:
            continue
        chunk = json.loads(message.removeprefix(PREFIX))
        if choices := chunk.get("choices"):
            measurement.num_timed += 1
            measurement.text += choices[0]["delta"].get("content") or ""
        elif usage := chunk.get("usage"):
            measurement.usage = usage
    assert measurement.num_timed, "no token came"
    return measurement


def _messages(packets: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    left = ""
    for packet in packets:
        if not packet.strip():
            continue
        *whole, left = (left + decoder.decode(packet.strip())).split(SEPARATOR)
        yield from filter(None, map(str.strip, whole))
        if _is_message(left):
            yield left.strip()
            left = ""


def _is_message(text: str) -> bool:
    if not text.startswith(PREFIX):
        return False
    data = text.removeprefix(PREFIX).strip()
    try:
        return data == END or json.loads(data) is not None
    except json.JSONDecodeError:
        return False
