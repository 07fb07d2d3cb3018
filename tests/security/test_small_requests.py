"""Requests of a few bytes that ask for gigabytes of frames, or for what no model could answer."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from app.store.frame_store import max_blob_bytes
from app.store.keys import RedisKeys
from dycoke_core.video import FrameSpec
from tests.integration.conftest import RedisServer
from tests.security.service import Service, ask, bearer, running, upload
from tests.security.tally import Tally

NUM_POSTS = 60
NUM_FRAMES, IMAGE_SIZE = 128, 256
MIB = 2**20
JOB_BYTES = max_blob_bytes(FrameSpec(NUM_FRAMES, IMAGE_SIZE), 0, 0)  # of its frames: 25 MB
BUDGET_BYTES = 4 * JOB_BYTES
HELD_BYTES = JOB_BYTES  # between readers and Redis
# How far a process may grow: what it holds, and the same again on its way in or out.
MAX_API_BYTES = 2 * HELD_BYTES + 2 * JOB_BYTES + 64 * MIB
MAX_REDIS_BYTES = 2 * BUDGET_BYTES
LONG = "sleep:0.1"  # each step of its answer, of which there are more than a test waits for
MAX_TOKENS = 2000
FRAMES = "small posts for 128 frames each: bytes reserved, memory, another key's question"
PROMPTS = "prompts that no model could take"


@pytest.fixture
def costly(own_redis_server: RedisServer, tmp_path: Path) -> Iterator[Service]:
    """With a Redis of its own, whose memory is looked at."""
    settings = {
        "DYCOKE_MAX_FRAME_STORE_BYTES": str(BUDGET_BYTES),
        "DYCOKE_MAX_HELD_FRAME_BYTES": str(HELD_BYTES),
        "DYCOKE_MAX_QUEUED_JOBS": "100000",  # what bounds these is not the queue
    }
    keys = RedisKeys("small")
    with running(own_redis_server.url, keys, tmp_path, image_size=IMAGE_SIZE, **settings) as made:
        yield made


class Watch:
    """The most that is reserved, and how far the processes have grown."""

    def __init__(self, service: Service, server: RedisServer) -> None:
        self._redis = redis.Redis.from_url(server.url)
        self._keys = RedisKeys("small")
        self._pid = service.pid
        self._before = self._grown()
        self._has_ended = threading.Event()
        self.max_reserved_bytes = 0

    def look(self) -> None:
        while not self._has_ended.wait(0.02):
            reserved = int(self._redis.get(self._keys.frame_bytes) or 0)
            self.max_reserved_bytes = max(self.max_reserved_bytes, reserved)

    def end(self) -> tuple[int, int]:
        """Bytes by which the peaks of the API and of Redis have grown."""
        self._has_ended.set()
        api, store = (now - before for now, before in zip(self._grown(), self._before, strict=True))
        self._redis.close()
        return api, store

    def _grown(self) -> tuple[int, int]:
        peak = next(
            int(line.split()[1]) * 1024
            for line in Path(f"/proc/{self._pid}/status").read_text().splitlines()
            if line.startswith("VmHWM:")
        )
        return peak, self._redis.info("memory")["used_memory_peak"]


@pytest.mark.parametrize("apart_s", [1e-6, 0.02])
def test_many_small_posts_take_no_more_than_their_budget(
    costly: Service, own_redis_server: RedisServer, apart_s: float, tally: Tally
) -> None:
    """A microsecond apart they share their frames; further apart each wants its own."""
    mine, others = (upload(client)["video_id"] for client in (costly.alice, costly.bob))
    watch = Watch(costly, own_redis_server)
    with ThreadPoolExecutor(17) as threads:
        looking = threads.submit(watch.look)
        ends = [0.5 + apart_s * number for number in range(NUM_POSTS)]
        posts = [threads.submit(post, costly, mine, end_s) for end_s in ends]
        answers = [each.result() for each in posts]
        num_refused = sum(not job_id for job_id, _ in answers)
        if num_refused:  # and those that were not are still under way
            assert ask(costly.bob, others)["finish_reason"] == "length"
        for job_id, _ in answers:
            if job_id:
                assert costly.alice.delete(f"/v1/jobs/{job_id}").is_success
        api_bytes, redis_bytes = watch.end()
        looking.result()
    for job_id, code in answers:
        is_fine = bool(job_id) or code == "frame_store_full"
        tally.count(FRAMES, None if is_fine else f"got a {code}")
    for name, num_bytes, limit in (
        ("reserved", watch.max_reserved_bytes, BUDGET_BYTES),
        ("the API", api_bytes, MAX_API_BYTES),
        ("Redis", redis_bytes, MAX_REDIS_BYTES),
    ):
        tally.count(FRAMES, f"{name}: {num_bytes}" if num_bytes > limit else None)
    assert bool(num_refused) == (apart_s > 0.01), answers
    for client, video_id in ((costly.alice, mine), (costly.bob, others)):
        receipt = ask(client, video_id, start_s=0.2)
        tally.count(FRAMES, None if receipt["text"] else "no answer afterwards")
    assert not costly.has_failed_inside()
    tally.check(FRAMES)


def post(service: Service, video_id: str, end_s: float) -> tuple[str, str]:
    """Returns the job's id, or "" and the error's code. The job keeps running."""
    body = {
        "question": LONG,
        "video_id": video_id,
        "num_frames": NUM_FRAMES,
        "end_s": end_s,
        "max_tokens": MAX_TOKENS,
        "on_disconnect": "continue",
    }
    with (
        httpx.Client(base_url=service.url, headers=bearer("alice"), timeout=120) as client,
        client.stream("POST", "/v1/video/chat", json=body) as reply,
    ):
        if reply.status_code == 200:
            return reply.headers["X-Job-Id"], ""
        reply.read()
        return "", str(reply.json()["code"])


# Prompts for a model of 4,096 tokens, of which a word takes at least one and a frame four: turns of
# the user and the assistant by turns, and fields.
WORDS = "a " * 16_000
IMPOSSIBLE: tuple[tuple[list[str], dict[str, Any]], ...] = (
    ([WORDS], {}),
    ([WORDS[:8200]], {}),
    (["\n\t \u3000".join("a" * 4200)], {}),
    ([WORDS] * 3, {}),
    (["What?", WORDS, "And?"], {}),
    ([WORDS] * 31, {}),
    (["What?"], {"max_tokens": 4096}),
    (["What?"], {"max_tokens": 4095}),
    (["What?"], {"num_frames": 128, "max_tokens": 3600, "compression": "full"}),
    (["What?"], {"num_frames": 100, "max_tokens": 3700, "compression": "full"}),
)


def as_chat(turns: list[dict[str, Any]], video_id: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"messages": turns, "video_id": video_id, **fields}


def as_completion(
    turns: list[dict[str, Any]], video_id: str, fields: dict[str, Any]
) -> dict[str, Any]:
    others = dict(fields)
    video = {"type": "video_url", "video_url": {"url": video_id}}
    content = [video, {"type": "text", "text": turns[0]["content"]}]
    kwargs = {"video": {"num_frames": others.pop("num_frames", 32)}}
    messages = [{"role": "user", "content": content}, *turns[1:]]
    return {"messages": messages, "media_io_kwargs": kwargs, **others}


@pytest.mark.parametrize(
    ("path", "body_of"), [("/v1/video/chat", as_chat), ("/v1/chat/completions", as_completion)]
)
def test_impossible_prompts_make_no_job(
    service: Service,
    path: str,
    body_of: Callable[[list[dict[str, Any]], str, dict[str, Any]], dict[str, Any]],
    tally: Tally,
) -> None:
    video_id = upload(service.alice)["video_id"]
    before = service.alice.get("/v1/usage").json()["total"]["jobs"]
    for contents, fields in IMPOSSIBLE:
        turns = [
            {"role": ("user", "assistant")[number % 2], "content": content}
            for number, content in enumerate(contents)
        ]
        for stream in (True, False):
            body = body_of(turns, video_id, fields | {"stream": stream})
            reply = service.alice.post(path, json=body)
            is_fine = reply.status_code == 400 and "prompt_too_long" in reply.text
            is_fine = is_fine and "X-Job-Id" not in reply.headers
            tally.count(PROMPTS, None if is_fine else f"{fields}: {reply.text[:200]}")
    assert service.alice.get("/v1/usage").json()["total"]["jobs"] == before
    assert not service.has_failed_inside()
    tally.check(PROMPTS)
