"""Frames of videos in Redis, by what they are made of: content, sampling and size.

Blobs are shared by all jobs about the same frames and kept, least recently used first out, under
one byte budget. A blob that a live job has pinned stays; the pin goes with the job's end. Its bytes
are reserved before its frames are read, under the same digest and pins: what is being read counts
like what is stored, and goes with the last live job that waits for it.

How often pixels are copied on their way, each time whole (14 MB for 32 frames of 384 x 384):

    reader's shared memory    decoded into; the API maps it              (`video.frame_buffer`)
    blob                      one copy out of that mapping               (`encode_frames`)
    the API's socket          by the client of Redis, and by the kernel
    Redis                     into the value (`SET`; no script sees it)
    the worker's socket       by the kernel, and by the client of Redis into the blob, which the
                              engine reads where it lies                 (`decode_frames`)
    tensor                    one copy of a micro-batch's distinct frames (`Backend.stage_frames`);
                              on a GPU the transfer, too

The worker drops its blob once the last micro-batch is through. A sequence that was preempted may
have it fetched again (`app.worker.frame_loader`): its job is live, so it is still stored.
"""

import asyncio
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256

import numpy as np
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.errors import FrameStoreFullError, StoreUnavailableError
from app.store.client import Scripts, in_our_words, milliseconds, shared_connection
from app.store.keys import RedisKeys
from dycoke_core.model_frames import DEFAULT_RESIZING, DEFAULT_SPREAD, PixelLimits, Resizing, Spread
from dycoke_core.video import FrameSpec, VideoFrames
from dycoke_core.video.types import MAX_PIXEL_BYTES, ReaderName, Sampling

BLOB_VERSION = 1
# A new BLOB_VERSION needs a new PIXELS_VERSION too: only this one is in the digest.
PIXELS_VERSION = 2  # version of the readers' pixels; 1: PyAV scaled in another way than decord
_LENGTH_BYTES = 4  # bytes of the header's length, big endian
_UPLOAD_TTL_S = 60.0  # of a blob that was sent but not stored
_MAX_HEADER_BYTES = 4096  # beside those of each frame
_MAX_HEADER_BYTES_PER_FRAME = 64
_HEADER_BYTES = 8192  # length and header nearly always fit into this many


@dataclass(frozen=True, slots=True)
class FramesHeader:
    """What a blob holds apart from the pixels."""

    shape: tuple[int, int, int, int]  # [F, height, width, 3]
    indices: tuple[int, ...]
    timestamps_s: tuple[float, ...]
    reader: ReaderName
    warnings: tuple[str, ...]
    shown_s: float | None = None  # earlier releases do not say


class FrameStore:
    """Every method raises `StoreUnavailableError` when Redis does not answer.

    Args:
        max_bytes: budget of all blobs together, the same in every process.
    """

    def __init__(self, redis: Redis, keys: RedisKeys, *, max_bytes: int) -> None:
        self._keys = keys
        self._large = shared_connection(redis, "large")
        self._scripts = Scripts(redis, keys.prefix)
        self._max_bytes = max_bytes
        self._following: set[asyncio.Task[None]] = set()

    async def pin(self, digest: str, job_id: str) -> FramesHeader | None:
        """Pins a blob for a live job, without fetching its pixels.

        Returns:
            Its description of the frames; None if it is not stored.
        """
        header = await self._scripts.run("pin_frames", digest, job_id, 0, 0, "")
        return parse_header(header) if header else None

    async def pin_or_reserve(
        self, digest: str, job_id: str, video: str, *, num_bytes: int
    ) -> FramesHeader | None:
        """Pins a blob for a live job, or reserves the bytes that the blob will take.

        Args:
            video: `JobRequest.cached_video`, with which the blob goes.

        Returns:
            As `pin`.

        Raises:
            FrameStoreFullError: live jobs hold too much of the budget.
        """
        header = await self._scripts.run(
            "pin_frames", digest, job_id, num_bytes, self._max_bytes, video
        )
        if header == 0:
            raise FrameStoreFullError
        return parse_header(header) if header else None

    async def put_and_pin(self, digest: str, blob: bytes, job_id: str, video: str) -> None:
        """Stores a blob, evicting others for what it takes beyond its reservation, and pins it if
        the job is live.

        The blob passes no script: Lua would copy it, and keep copies until they are collected.

        Args:
            video: `JobRequest.cached_video`, with which the blob goes.

        Raises:
            FrameStoreFullError: live jobs hold too much of the budget.
        """
        upload = self._keys.frame_upload(job_id)
        try:
            with in_our_words:
                await self._large.call("SET", upload, blob, "PX", milliseconds(_UPLOAD_TTL_S))
            outcome = await self._scripts.run("put_frames", digest, job_id, self._max_bytes, video)
        except BaseException:  # for example, the job was cancelled
            self._drop(upload)
            raise
        if outcome == 0:
            raise FrameStoreFullError
        if outcome < 0:
            raise StoreUnavailableError(
                "the frames were lost on their way into the job store: try again"
            )

    def _drop(self, upload: str) -> None:
        """Takes a blob back that may have been sent, and that no budget counts. Where that fails,
        it expires.
        """
        self._follow("UNLINK", upload)

    async def get(self, digest: str) -> bytes | None:
        with in_our_words:
            blob: bytes | None = await self._large.call("GET", self._keys.frames(digest))
        # The client keeps the buffer of a reply, as large as the blob, until the next one.
        self._follow("PING")
        return blob

    def _follow(self, *command: str) -> None:
        """Sends a command behind all that was sent before. It may wait for other blobs, and nobody
        waits for it.
        """

        async def call() -> None:
            with suppress(RedisError):
                await self._large.call(*command)

        following = asyncio.create_task(call())
        self._following.add(following)
        following.add_done_callback(self._following.discard)

    async def frame(self, digest: str, index: int) -> tuple[FramesHeader, bytes] | None:
        """One frame's pixels, [height, width, 3], with what the blob says of all; None if it is not
        stored.

        Raises:
            IndexError: the blob has fewer frames.
        """
        start = await self._bytes(digest, 0, _HEADER_BYTES - 1)
        if not start:
            return None
        header_end = _LENGTH_BYTES + int.from_bytes(start[:_LENGTH_BYTES], "big")
        if header_end > len(start):
            start += await self._bytes(digest, len(start), header_end - 1)
        header = parse_header(start[_LENGTH_BYTES:header_end])
        num_frames, height, width, channels = header.shape
        if not 0 <= index < num_frames:
            raise IndexError(index)
        size = height * width * channels
        from_end = (num_frames - index) * size  # everything after the header is pixels
        pixels = await self._bytes(digest, -from_end, size - from_end - 1)
        return (header, pixels) if len(pixels) == size else None

    async def _bytes(self, digest: str, first: int, last: int) -> bytes:
        """A part of a blob, from its end where the offsets are negative; empty if not stored."""
        with in_our_words:
            part: bytes = await self._large.call(
                *("GETRANGE", self._keys.frames(digest), first, last)
            )
        return part


def frames_digest(
    video_id: str,
    *,
    num_frames: int,
    image_size: int | PixelLimits,
    start_s: float | None,
    end_s: float | None,
    sampling: Sampling,
    spread: Spread = DEFAULT_SPREAD,
    resizing: Resizing = DEFAULT_RESIZING,
    salt: str = "",
) -> str:
    """Names a blob by everything that its pixels depend on.

    Args:
        salt: of those who share blobs, and all that workers keep by this name.
    """
    size: object = image_size if isinstance(image_size, int) else asdict(image_size)
    parts: list[object] = [
        *(PIXELS_VERSION, video_id, num_frames, size),
        *(start_s, end_s, sampling),
    ]
    if spread != DEFAULT_SPREAD:
        parts.append({"spread": spread})
    if resizing != DEFAULT_RESIZING:
        parts.append({"resizing": resizing})
    if salt:
        parts.append(salt)
    return sha256(json.dumps(parts).encode()).hexdigest()


def own_digest(digest: str, job_id: str) -> str:
    """Names a blob that belongs to one job only, though others may want the same frames."""
    return sha256(f"{digest} {job_id}".encode()).hexdigest()


def max_blob_bytes(spec: FrameSpec, height: int, width: int) -> int:
    """The maximum size of a blob with such frames of a video.

    Args:
        height, width: the video's, in pixels, as its headers say; 0: they do not.

    Raises:
        InvalidRequestError: as `FrameSpec.shape`.
    """
    is_known = bool(height and width) or not spec.keeps_shape
    pixel_bytes = math.prod(spec.shape(height, width)) if is_known else MAX_PIXEL_BYTES
    header_bytes = _MAX_HEADER_BYTES + spec.num_frames * _MAX_HEADER_BYTES_PER_FRAME
    return _LENGTH_BYTES + header_bytes + pixel_bytes


def header_of(frames: VideoFrames) -> FramesHeader:
    """What a blob holds of these frames besides their pixels."""
    num_frames, height, width, channels = frames.pixels.shape
    return FramesHeader(
        shape=(num_frames, height, width, channels),
        indices=frames.indices,
        timestamps_s=frames.timestamps_s,
        reader=frames.reader,
        warnings=frames.warnings,
        shown_s=frames.shown_s,
    )


def encode_frames(frames: VideoFrames) -> bytes:
    """The header's length, a JSON header, then the pixels as they lie in memory."""
    header = json.dumps(
        {
            "version": BLOB_VERSION,
            "shape": frames.pixels.shape,
            "indices": frames.indices,
            "timestamps_s": frames.timestamps_s,
            "reader": frames.reader,
            "warnings": frames.warnings,
            "shown_s": frames.shown_s,
        }
    ).encode()
    pixels = np.ascontiguousarray(frames.pixels, dtype=np.uint8)
    return b"".join((len(header).to_bytes(_LENGTH_BYTES, "big"), header, pixels.data))


def decode_frames(blob: bytes) -> VideoFrames:
    """The inverse of `encode_frames`. The pixels are the blob's own, and read-only.

    Raises:
        ValueError: not a blob that this version wrote.
    """
    pixels_at = _LENGTH_BYTES + int.from_bytes(blob[:_LENGTH_BYTES], "big")
    header = parse_header(blob[_LENGTH_BYTES:pixels_at])
    pixels = np.frombuffer(blob, dtype=np.uint8, offset=pixels_at)
    return VideoFrames(
        pixels=pixels.reshape(header.shape),
        indices=header.indices,
        timestamps_s=header.timestamps_s,
        reader=header.reader,
        warnings=header.warnings,
        shown_s=header.shown_s,
    )


def parse_header(text: bytes) -> FramesHeader:
    """Reads what a blob says before its pixels. Raises: ValueError."""
    header = json.loads(text)
    if header.get("version") != BLOB_VERSION:
        raise ValueError("frames of another version")
    frames, height, width, channels = header["shape"]
    return FramesHeader(
        shape=(frames, height, width, channels),
        indices=tuple(header["indices"]),
        timestamps_s=tuple(header["timestamps_s"]),
        reader=header["reader"],
        warnings=tuple(header["warnings"]),
        shown_s=header.get("shown_s"),
    )
