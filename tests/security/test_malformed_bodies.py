"""Malformed bodies: refused with a 4xx that has a code, and nothing breaks inside."""

import json
import random
from collections.abc import Iterator

import httpx
import pytest

from tests.security.scale import SCALE
from tests.security.service import CLIP, Service
from tests.security.tally import Tally

SEED = 13
POSTS = ("/v1/video/chat", "/v1/chat/completions")
FORMS = ("/v1/video/chat", "/v1/videos", "/v1/files")
BOUNDARY = "b"
DEEP = 100_000
Reply = tuple[str, httpx.Response]

VALUES = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-0", "9" * 5000, "1" + "0" * 400, "0.1e-999"),
    *('"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"' + "x" * 70_000 + '"', '"\xff"'),
    *("null", "true", "[]", "{}", '[{"role": "user"}]', '{"a": {"a": {"a": 1}}}'),
)


def json_bodies() -> Iterator[bytes]:
    """Not JSON, not an object, nested, doubled, and odd values in every field."""
    for text in ("", " ", "{", "}", "[]", '""', "null", "0", "NaN", "{'a': 1}", '{"a": 1,}'):
        yield text.encode()
    yield b"\xef\xbb\xbf{}"
    yield b"\x00" * 100
    yield '{"question": "a"}'.encode("utf-16")
    yield b"[" * DEEP + b"]" * DEEP
    yield b'{"a":' * DEEP + b"1" + b"}" * DEEP
    yield b'{"question": "a", "question": "b", "video_id": "x"}'
    yield b"{" + b",".join(b'"k%d": 1' % n for n in range(20_000)) + b"}"
    fields = (
        "question",
        "video_id",
        "messages",
        "num_frames",
        "start_s",
        "max_tokens",
        "seed",
        "temperature",
        "stop",
        "compression",
        "stream",
        "model",
        "response_format",
        "n",
    )
    for field in fields:
        for value in VALUES:
            yield f'{{"question": "a", "video_id": "vid_x", "{field}": {value}}}'.encode(
                "utf-8", "surrogatepass"
            )
    for url in data_urls():
        part = {"type": "video_url", "video_url": {"url": url}}
        yield json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()
    chance = random.Random(SEED)
    sound = b'{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stop": ["a"]}'
    for _ in range(SCALE.num_random):
        yield mutated(sound, chance)


def data_urls() -> Iterator[str]:
    yield from ("data:", "data:video/mp4", "data:video/mp4;base64", "data:;base64,", "data:,")
    for body in ("====", "!!!!", "AAA", "A" * 65, "AAAA" * 20_000, "AAAA====AAAA", "\u20ac", "%00"):
        yield f"data:video/mp4;base64,{body}"
    yield from ("file:///etc/passwd", "http://127.0.0.1/", "http://[::1]:80/", "gopher://a/", "//a")


def form_bodies() -> Iterator[bytes]:
    """Parts without an end, a name or a meaning."""
    line = b"--" + BOUNDARY.encode()
    disposition = b'Content-Disposition: form-data; name="%s"'
    yield b""
    yield line
    yield line + b"--\r\n"
    yield b"no boundary at all"
    yield line + b"\r\n\r\n" + line + b"--\r\n"
    yield line + b"\r\n" + disposition % b"video" + b"\r\n\r\n"
    yield line + b"\r\nContent-Disposition: form-data\r\n\r\na\r\n" + line + b"--\r\n"
    yield line + b"\r\n" + b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n"
    yield (line + b"\r\n" + disposition % b"question" + b"\r\n\r\na\r\n") * 2000 + line + b"--\r\n"
    for name in (b"video", b"file", b"question", b"purpose", b"\xff\xfe", b"a" * 10_000, b'"'):
        for content in (b"", b"\x00" * 100, b"\xed\xa0\x80", CLIP.read_bytes()[:200], b"NaN"):
            part = line + b"\r\n" + disposition % name + b'; filename="../../x"'
            yield part + b"\r\n\r\n" + content + b"\r\n" + line + b"--\r\n"
    chance = random.Random(SEED)
    part = line + b"\r\n" + disposition % b"video" + b'; filename="a"\r\n\r\n'
    sound = part + CLIP.read_bytes()[:500] + b"\r\n" + line + b"--\r\n"
    for _ in range(SCALE.num_random):
        yield mutated(sound, chance)


def mutated(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(changed))
        if chance.random() < 0.5:
            changed[at] = chance.randrange(256)
        else:
            del changed[at : at + chance.randint(1, 20)]
    return bytes(changed) or b"{"


def verdict(reply: httpx.Response) -> str | None:
    """What is wrong with a refusal; None where it is a good one. An answer is no fault either:
    some mutants are sound.
    """
    if reply.status_code >= 500:
        return f"{reply.status_code}: {reply.text[:200]}"
    if reply.status_code >= 400:
        problem = reply.json()
        code = problem.get("code") or problem.get("error", {}).get("code")
        if not isinstance(code, str):
            return f"{reply.status_code} without a code: {reply.text[:200]}"
    return None


def post(service: Service, path: str, kind: str, body: bytes, row: str, tally: Tally) -> None:
    reply = service.alice.post(path, content=body, headers={"Content-Type": kind})
    found = verdict(reply)
    tally.count(row, found and f"{path} {body[:80]!r}: {found}")


@pytest.mark.timeout(SCALE.timeout_s)
@pytest.mark.parametrize("path", POSTS)
def test_no_json_breaks_anything(path: str, service: Service, tally: Tally) -> None:
    row = "malformed JSON bodies and `data:` URLs"
    for body in json_bodies():
        post(service, path, "application/json", body, row, tally)
    assert not service.has_failed_inside()
    tally.check(row)


@pytest.mark.timeout(SCALE.timeout_s)
@pytest.mark.parametrize("path", FORMS)
def test_no_form_breaks_anything(path: str, service: Service, tally: Tally) -> None:
    row = "malformed forms"
    for body in form_bodies():
        post(service, path, f"multipart/form-data; boundary={BOUNDARY}", body, row, tally)
    for kind in ("multipart/form-data", "multipart/form-data; boundary=", "text/plain", "", "\xe9"):
        reply = service.alice.post(
            path, content=b"--b--", headers={"Content-Type": kind.encode("latin-1")}
        )
        tally.count(row, verdict(reply))
    assert not service.has_failed_inside()
    tally.check(row)
