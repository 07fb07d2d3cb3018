"""A real API for the tests: uvicorn on a free port, frame readers and a worker that obey the test.

The server runs in the test's own event loop, so a test can hold a reader or a worker at any point.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np

from app.api.app import create_app
from app.api.context import Api
from app.api.listener import bind
from app.api.server import ApiServer
from app.messages import (
    CacheUse,
    CompressionChoice,
    CompressionReceipt,
    DoneEvent,
    Flops,
    FlopsByFormula,
    FrameLimits,
    FramesReceipt,
    JobRequest,
    Memory,
    ModelCard,
    RetainedRatio,
    StatusEvent,
    Timings,
    TokenEvent,
    Usage,
)
from app.settings import Settings
from app.store.client import connect
from app.store.job_leases import Append, Delivery, JobLeases
from app.store.keys import RedisKeys
from app.store.worker_registry import WorkerRegistry
from app.worker.receipt import auto_receipt
from dycoke_core.auto import AutoConfig, resolved_compression
from dycoke_core.video import FrameReaders, FrameSpec, VideoFrames, VideoProbe
from dycoke_core.video.types import FailureCode

MODEL = "tiny"
CLIP = b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom" + bytes(range(256)) * 8
PATIENCE_S = 20.0


class FakeReaders:
    """Readers that read nothing and finish when the test lets them."""

    def __init__(self) -> None:
        self.may_probe = asyncio.Event()
        self.may_probe.set()
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.num_probes = 0
        self.num_reads = 0
        self.num_cancelled = 0
        self.probe_error: Exception | None = None
        self.read_error: Exception | None = None
        self.warnings: tuple[str, ...] = ()
        self.fallback_cause: FailureCode | None = None
        self.kills: Mapping[str, int] = {"timeout": 0}
        self.num_exceptions = 0

    async def probe(self, path: Path) -> VideoProbe:
        self.num_probes += 1
        await self._wait(self.may_probe)
        if self.probe_error is not None:
            raise self.probe_error
        return VideoProbe("mp4", "h264", 64, 48, 10.0, 250, 25.0)

    async def read(
        self,
        path: Path,
        spec: FrameSpec,
        *,
        on_progress: Callable[[float], None] | None = None,
        timeout_s: float | None = None,
    ) -> VideoFrames:
        self.num_reads += 1
        assert path.is_file()
        if on_progress is not None:
            on_progress(0.5)
        await self._wait(self.may_read)
        if self.read_error is not None:
            raise self.read_error
        return VideoFrames(
            pixels=np.zeros(spec.shape(48, 64), np.uint8),
            indices=tuple(range(spec.num_frames)),
            timestamps_s=tuple(float(i) for i in range(spec.num_frames)),
            reader="decord",
            warnings=self.warnings,
            fallback_cause=self.fallback_cause,
        )

    async def aclose(self) -> None:
        pass

    async def _wait(self, event: asyncio.Event) -> None:
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


class _Server(ApiServer):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are the test runner's


@dataclass
class RunningApi:
    client: httpx.AsyncClient
    port: int
    readers: FakeReaders
    server: ApiServer
    api: Api
    settings: Settings
    serving: asyncio.Task[None]

    async def post(self, **fields: Any) -> httpx.Response:
        """Posts a chat and reads the whole answer."""
        async with self.posting(**fields) as response:
            await response.aread()
            return response

    async def metrics(self) -> str:
        """The page of `/metrics`, without the label of its only process."""
        page = (await self.client.get("/metrics")).text
        return page.replace('{process="0"}', "").replace('process="0",', "")

    @asynccontextmanager
    async def posting(
        self, *, clip: bytes | None = CLIP, headers: Mapping[str, str] = {}, **fields: Any
    ) -> AsyncIterator[httpx.Response]:
        """Posts a chat as a form, or without a clip as JSON."""
        fields = {"question": "What happens?", **fields}
        fields = {name: value for name, value in fields.items() if value is not None}
        body: dict[str, Any] = (
            {"json": fields}
            if clip is None
            else {"data": {n: form_value(v) for n, v in fields.items()}, "files": {"video": clip}}
        )
        async with self.client.stream("POST", "/v1/video/chat", headers=headers, **body) as reply:
            yield reply


def form_value(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], str):
        return value  # a field that repeats
    return value if isinstance(value, str) else json.dumps(value)


@asynccontextmanager
async def running_api(
    redis_url: str,
    keys: RedisKeys,
    data_dir: Path,
    *,
    has_real_readers: bool = False,
    **settings: Any,
) -> AsyncIterator[RunningApi]:
    values = {
        "redis_url": redis_url,
        "redis_prefix": keys.prefix,
        "data_dir": data_dir,
        "default_compression": "dycoke",
        "lease_s": 3.0,
        **settings,
    }
    readers = FakeReaders()
    config = Settings(**values)
    app = create_app(config, readers=None if has_real_readers else cast(FrameReaders, readers))
    server = _Server(app, config)
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        base_url = f"http://127.0.0.1:{port}"
        try:
            async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as client:
                yield RunningApi(client, port, readers, server, app.state.api, config, serving)
        finally:
            server.begin_drain()
            server.begin_drain()  # at once
            await asyncio.wait_for(serving, PATIENCE_S)


class ScriptedWorker:
    """A worker's side of Redis, one step at a time."""

    def __init__(
        self,
        redis_url: str,
        keys: RedisKeys,
        model: str = MODEL,
        image_size: int = 8,
        frame_limits: FrameLimits | None = None,
    ) -> None:
        self.redis = connect(redis_url)
        self.keys = keys
        self.model = model
        self._image_size, self._frame_limits = image_size, frame_limits
        self.leases = JobLeases(
            self.redis, keys, model=model, worker_id=f"worker-{model}", result_ttl_s=60
        )

    async def start(self) -> None:
        await self.leases.ensure_group()
        await self.publish_card()

    async def publish_card(self) -> None:
        card = ModelCard(
            worker_id=f"worker-{self.model}",
            model=self.model,
            weights_digest="w",
            device="cpu",
            dtype="float32",
            image_size=self._image_size,
            frame_limits=self._frame_limits,
            tokens_per_frame=4,
            frames_per_unit=1,
            max_words_per_token=1,
            num_layers=6,
            max_model_tokens=4096,
            prefill_chunk_tokens=64,
            sampler_version=3,
            max_running_jobs=4,
            running_jobs=0,
        )
        await WorkerRegistry(self.redis, self.keys).publish(card, 60)

    async def withdraw(self) -> None:
        await WorkerRegistry(self.redis, self.keys).withdraw(f"worker-{self.model}")

    async def aclose(self) -> None:
        await self.redis.aclose()

    async def take(self) -> Delivery:
        """Takes the next job that has not ended."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                delivery = await self.leases.take(block_s=0.2)
                if delivery is not None:
                    return delivery

    async def say(self, delivery: Delivery, *indices: int) -> bool:
        return await self._append(Append(delivery, [token(i) for i in indices]))

    async def status(
        self,
        delivery: Delivery,
        stage: Any,
        progress: float,
        auto: CompressionChoice | None = None,
    ) -> bool:
        status = StatusEvent(stage=stage, progress=progress, auto=auto)
        return await self._append(Append(delivery, [status]))

    async def finish(
        self, delivery: Delivery, num_tokens: int, auto: CompressionChoice | None = None
    ) -> bool:
        return await self._append(Append(delivery, [], receipt(delivery, num_tokens, auto)))

    async def answer(self, num_tokens: int = 3) -> Delivery:
        """Takes a job and answers it."""
        delivery = await self.take()
        for index in range(num_tokens):
            assert await self.say(delivery, index)
        assert await self.finish(delivery, num_tokens)
        return delivery

    async def _append(self, append: Append) -> bool:
        return (await self.leases.append([append]))[0].is_accepted


@asynccontextmanager
async def scripted_worker(
    redis_url: str,
    keys: RedisKeys,
    model: str = MODEL,
    image_size: int = 8,
    frame_limits: FrameLimits | None = None,
) -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker(redis_url, keys, model, image_size, frame_limits)
    try:
        await worker.start()
        yield worker
    finally:
        await worker.aclose()


def token(index: int) -> TokenEvent:
    return TokenEvent(index=index, text=f"t{index} ", token_ids=[100 + index])


def resolved_auto(request: JobRequest) -> AutoConfig:
    config = resolved_compression(request.compression)
    assert isinstance(config, AutoConfig)
    return config


def receipt(
    delivery: Delivery, num_tokens: int, auto: CompressionChoice | None = None
) -> DoneEvent:
    request = delivery.request
    compression = request.compression if auto is None else auto.compression
    frames = request.frames
    assert frames is not None or request.video_id is None
    flops = Flops(full=2.0, actual=1.0, ratio=0.5)
    return DoneEvent(
        job_id=request.job_id,
        model=request.model,
        video_id=request.video_id,
        finish_reason="stop",
        text="".join(token(i).text for i in range(num_tokens)),
        usage=Usage(
            prompt_tokens=20,
            visual_tokens=16 if frames else 0,
            completion_tokens=num_tokens,
        ),
        compression=CompressionReceipt(
            policy=compression["policy"],
            parameters={},
            auto=None if auto is None else auto_receipt(resolved_auto(request), auto),
            visual_tokens_in=16,
            visual_tokens_prefill=8,
            visual_tokens_decode=4,
            retained_ratio=(
                RetainedRatio(prefill=0.5, decode=0.25, decode_all_layers=0.3) if frames else None
            ),
            kept_per_frame=[4, 4],
            decode_steps=num_tokens - 1,
            refreshes=0,
            flops=FlopsByFormula(paper=flops, exact=flops),
        ),
        frames=FramesReceipt.of(frames) if frames else None,
        timings_s=Timings(
            upload=request.upload_s,
            read_frames=request.read_frames_s,
            queue=0.0,
            vision=0.0,
            compress=0.0,
            prefill=0.0,
            ttft=0.1,
            decode=0.1,
            per_output_token=0.05,
            total=0.3,
        ),
        memory=Memory(
            kv_bytes=1000, dp_cache_bytes=10, kv_bytes_full_tokens=2000, peak_device_bytes=10**8
        ),
        cache=CacheUse(frames="hit" if frames.is_cached else "miss", features="miss", prefix="miss")
        if frames
        else None,
        attempts=delivery.attempt,
        priority=request.priority,
        seed=request.seed,
        cached_tokens=5 if frames else 0,
        warnings=request.warnings,
    )


# --- reading event streams ---


@dataclass(frozen=True)
class SseEvent:
    name: str
    data: dict[str, Any]
    id: str | None


class EventReader:
    """Parses an event stream as it comes. Without a reference to it, httpx closes the response."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()
        self.comments: list[str] = []

    async def next(self) -> SseEvent | None:
        """The next event; None at the stream's end."""
        name, data, event_id = "", "", None
        async with asyncio.timeout(PATIENCE_S):
            async for line in self._lines:
                field, _, value = line.partition(": ")
                if line == "" and name:
                    return SseEvent(name, json.loads(data), event_id)
                if line.startswith(":"):
                    self.comments.append(line)
                elif field == "event":
                    name = value
                elif field == "data":
                    data = value
                elif field == "id":
                    event_id = value
        return None

    async def until(self, name: str, **data: Any) -> SseEvent:
        """Reads on to the first event with this name that says this."""
        while (event := await self.next()) is not None:
            if event.name == name and data.items() <= event.data.items():
                return event
        raise AssertionError(f"the stream ended before '{name}' {data}")

    async def rest(self) -> list[SseEvent]:
        events = []
        while (event := await self.next()) is not None:
            events.append(event)
        return events


def parse_events(text: str) -> list[SseEvent]:
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if fields:
            data = json.loads(fields["data"])
            events.append(SseEvent(fields["event"], data, fields.get("id")))
    return events


# --- waiting ---


async def until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
    """Waits for a condition that the server under test will bring about."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def until_state(api: RunningApi, job_id: str, *states: str) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            job: dict[str, Any] = (await api.client.get(f"/v1/jobs/{job_id}")).json()
            if job["state"] in states:
                return job
            await asyncio.sleep(0.02)


async def raw_request(port: int, head: str, body: bytes = b"") -> bytes:
    """Sends bytes as they are and returns what comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def only_job(api: RunningApi) -> str:
    keys = RedisKeys(api.settings.redis_prefix)
    redis = connect(api.settings.redis_url or "")
    (job_id,) = await redis.zrange(keys.live, 0, -1)
    await redis.aclose()
    return str(job_id.decode())


def num_workers(api: RunningApi) -> float | None:
    return api.api.metrics.registry.get_sample_value("dycoke_workers_alive", {"model": "tiny"})
