"""Everything that crosses Redis, as versioned JSON types, and the receipt that clients read.

The events of a job are the same JSON in Redis and in SSE: first a `JobEvent`, then `StatusEvent`s
and `TokenEvent`s, then one `DoneEvent` or `ErrorEvent`, which ends the stream. Only `StatusEvent`
is not durable: later readers skip it, and in SSE it has no id.
"""

import json
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from app.keys.entries import ANONYMOUS
from dycoke_core.auto import is_auto
from dycoke_core.config import DEFAULT_PRIORITY, Priority
from dycoke_core.errors import DycokeError
from dycoke_core.frame_rate import RateRule
from dycoke_core.model_frames import DEFAULT_RESIZING, DEFAULT_SPREAD, PixelLimits, Resizing, Spread
from dycoke_core.video.types import Sampling

WIRE_VERSION = 1
NO_POLICY = "none"  # in metrics, of jobs without a video, which compress nothing
REQUESTED_AUTO, REQUESTED_FIXED = "auto", "fixed"  # in metrics: who chose the policy


class Message(BaseModel):
    """Frozen. Unknown fields are ignored, so that an older process can read a newer one's."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class JobState(StrEnum):
    READING = "reading"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    ERROR = "error"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobState.DONE, JobState.ERROR, JobState.CANCELLED)


class Turn(Message):
    role: Literal["system", "user", "assistant"]
    content: str


class FrameLimits(Message):
    """`dycoke_core.model_frames.PixelLimits`."""

    multiple: int
    min_pixels: int
    max_pixels: int
    frames_per_unit: int | None = None

    def limits(self) -> PixelLimits:
        return PixelLimits(**self.model_dump())


class FrameRate(Message):
    """How many frames a rate makes, as `RateRule` has it."""

    min_frames: int
    max_frames: int
    multiple: int

    def rule(self) -> RateRule:
        return RateRule(**self.model_dump())


class FramesWanted(Message):
    """Which frames to read; any API process may be the reader."""

    num_frames: int
    image_size: int
    limits: FrameLimits | None = None  # of frames that keep their shape; None: square ones
    start_s: float | None = None
    end_s: float | None = None
    sampling: Sampling = "uniform"  # of releases that do not say
    spread: Spread = DEFAULT_SPREAD  # likewise
    fps: float | None = None  # by which `num_frames` was counted; None: it was not
    resizing: Resizing = DEFAULT_RESIZING  # likewise


class FramesRef(Message):
    """Which frames a job is about, and where their pixels lie in the frame store."""

    digest: str  # key of the blob: content, sampling and size
    num_frames: int
    image_size: int
    height: int = 0  # pixels, as they were read; 0 of releases that do not say
    width: int = 0
    indices: list[int]
    timestamps_s: list[float]
    reader: str  # decord or pyav
    warnings: list[str] = []
    sampling: Sampling = "uniform"  # of releases that do not say
    start_s: float | None = None  # of the clip, as it was read
    end_s: float | None = None
    fps: float | None = None  # by which they were counted
    is_cached: bool  # found in the frame store


class JobRequest(Message):
    """A job as resolved at admission: nothing in it depends on who runs it."""

    version: int = WIRE_VERSION
    job_id: str
    owner: str = ANONYMOUS  # of releases that do not say
    cache_salt: str = ""  # jobs of another salt find none of this one's frames and features
    model: str
    video_id: str | None  # None: a conversation without a video
    messages: list[Turn]
    video_turn: int | None = None  # index of the video's turn; None: the first of the user's
    frames_wanted: FramesWanted | None = None  # None of releases that do not say
    frames: FramesRef | None = None  # None while the frames are being read
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: list[str]
    ignore_eos: bool = False
    compression: dict[str, Any]
    priority: Priority = DEFAULT_PRIORITY  # of releases that do not say
    deadline_s: float | None = None  # from acceptance, as the client has set it
    warnings: list[str] = []  # what was asked and is not honoured, for the receipt
    kept_mask: bool = False  # the receipt says which visual tokens were kept
    tells_prompt_tokens: bool = False  # with the first token already
    # What the answer's numerics depend on, from the model card at admission.
    weights_digest: str
    dtype: str
    prefill_chunk_tokens: int
    sampler_version: int = 1  # of releases that do not say
    accepted_at_s: float  # Unix time
    deadline_at_s: float  # Unix time; that of the client or of `JOB_TIMEOUT_S`
    upload_s: float = 0.0
    read_frames_s: float = 0.0
    traceparent: str | None = None  # the span it belongs to, as W3C writes it

    @property
    def cached_video(self) -> str | None:
        """What the frames and features of its video are kept under; None without one."""
        return None if self.video_id is None else cached_video(self.video_id, self.cache_salt)

    @property
    def log_fields(self) -> dict[str, str]:
        """What a line of the log about this job carries."""
        fields = {"job_id": self.job_id}
        if self.traceparent is not None:
            fields["trace_id"] = self.traceparent.split("-")[1]
        return fields

    @property
    def policy_label(self) -> str:
        """The policy, for the labels of metrics."""
        return NO_POLICY if self.video_id is None else str(self.compression["policy"])

    @property
    def requested_label(self) -> str:
        """Who chooses the policy, for the labels of metrics."""
        return REQUESTED_AUTO if is_auto(self.compression) else REQUESTED_FIXED


def cached_video(video_id: str, cache_salt: str) -> str:
    """A video as caches name it: once for each salt."""
    return f"{cache_salt}:{video_id}" if cache_salt else video_id


class ModelCard(Message):
    """What a worker serves; published with a heartbeat, read by every API."""

    version: int = WIRE_VERSION
    worker_id: str
    model: str
    weights_digest: str
    device: str
    dtype: str
    image_size: int  # pixels, of square frames
    frame_limits: FrameLimits | None = None  # of frames that keep their shape
    frame_spread: Spread = DEFAULT_SPREAD  # of releases that do not say
    frame_rate: FrameRate | None = None  # None: length times rate, rounded down
    frame_resizing: Resizing = DEFAULT_RESIZING  # likewise
    tokens_per_frame: int  # N, of a unit of square ones
    frames_per_unit: int = 1  # of releases that do not say
    max_words_per_token: int | None = None  # None of releases that do not say; see `EngineCard`
    num_layers: int
    max_model_tokens: int
    prefill_chunk_tokens: int
    sampler_version: int = 1  # of releases that do not say
    max_running_jobs: int
    running_jobs: int


class CompressionChoice(Message):
    """What policy `auto` chose for a job; every attempt at the answer keeps to it."""

    compression: dict[str, Any]
    level: int
    reason: str  # a `Reason`; another release may have more of them
    predicted_ttft_s: float


# --- receipt ---


class Usage(Message):
    prompt_tokens: int
    visual_tokens: int
    completion_tokens: int


class RetainedRatio(Message):
    prefill: float
    decode: float
    decode_all_layers: float


class Flops(Message):
    full: float
    actual: float
    ratio: float  # actual / full


class FlopsByFormula(Message):
    paper: Flops  # Eq. 8: language model only, counts mostly multiply-adds
    exact: Flops  # vision tower, gated MLP, GQA, causal attention, language head


class AutoReceipt(Message):
    """How policy `auto` came to the compression that the receipt names."""

    objective_s: float
    at_least: float
    level: int  # of the ladder: 0 is the least compression
    num_levels: int
    reason: str  # a `Reason`; another release may have more of them
    predicted_ttft_s: float  # `timings_s.ttft` says what came of it


class CompressionReceipt(Message):
    policy: str
    parameters: dict[str, Any]
    auto: AutoReceipt | None = None  # None: the request named the policy
    visual_tokens_in: int
    visual_tokens_prefill: int
    visual_tokens_decode: int
    # 0 of releases that do not say, and without a video.
    units: int = 0  # that the model makes visual tokens of: frames, or several at a time
    tokens_per_unit: int = 0  # N, in `rows` rows of `columns`
    rows: int = 0
    columns: int = 0
    pruned_layers: list[int] = []  # that attend to `visual_tokens_decode`; 0 is the first layer
    retained_ratio: RetainedRatio | None  # None without a video
    kept_per_frame: list[int]
    decode_steps: int
    refreshes: int
    flops: FlopsByFormula


class FramesReceipt(Message):
    indices: list[int]
    timestamps_s: list[float]
    height: int = 0  # pixels, as the model saw them; 0 of releases that do not say
    width: int = 0
    reader: str
    warnings: list[str]
    sampling: Sampling = "uniform"  # of releases that do not say
    start_s: float | None = None  # of the clip, as it was read
    end_s: float | None = None
    fps: float | None = None  # that was asked for; None: a number of frames was, or nothing

    @classmethod
    def of(cls, frames: FramesRef) -> Self:
        return cls.model_validate(frames.model_dump(include=set(cls.model_fields)))


class Timings(Message):
    """Seconds. Those of the engine are the last attempt's."""

    upload: float
    read_frames: float
    queue: float  # from queued to taken by the worker that finished, plus waiting in its engine
    vision: float
    compress: float
    prefill: float
    ttft: float  # from acceptance to the first token in the event log
    decode: float
    per_output_token: float | None  # None for answers of one token
    total: float  # from acceptance to the end


class Memory(Message):
    kv_bytes: int
    dp_cache_bytes: int
    kv_bytes_full_tokens: int
    peak_device_bytes: int


class CacheUse(Message):
    frames: Literal["hit", "miss"]
    features: Literal["hit", "miss"]
    prefix: Literal["hit", "miss"]


class KeptMask(Message):
    """Which visual tokens were kept. Bitsets in base64: a bit for each of a unit's tokens, row
    after row, unit after unit, most significant bit first, padded to whole bytes with zeros.
    """

    units: int  # frames, or temporal patches of several
    tokens_per_unit: int  # rows * columns
    rows: int
    columns: int
    stage1: str  # into the language model
    stage2: str | None  # at the last decode step, a subset; None where stage II is off


# --- events ---


class JobEvent(Message):
    type: Literal["job"] = "job"
    job_id: str
    video_id: str | None
    model: str
    compression: dict[str, Any]


class StatusEvent(Message):
    type: Literal["status"] = "status"
    stage: Literal["queued", "reading_frames", "encoding", "prefilling"]
    progress: float = Field(0.0, ge=0, le=1)
    position: int | None = None  # 0 = next; with stage `queued` only
    # What policy `auto` has chosen, from then on: before the video is encoded.
    auto: CompressionChoice | None = Field(None, exclude_if=lambda value: value is None)


class TokenEvent(Message):
    type: Literal["token"] = "token"
    index: int
    text: str
    token_ids: list[int]
    # With an answer's first token, of a request that asks for it; left out of all other events.
    prompt_tokens: int | None = Field(None, exclude_if=lambda value: value is None)

    @property
    def next_index(self) -> int:
        """Index of the next event. Text alone, at an answer's very end, counts as a token."""
        return self.index + max(1, len(self.token_ids))


class DoneEvent(Message):
    """The receipt. Without a video: no `video_id`, `frames`, `cache`, `kept_mask` and retained
    ratio."""

    type: Literal["done"] = "done"
    job_id: str
    model: str
    video_id: str | None
    finish_reason: Literal["stop", "length"]
    text: str
    usage: Usage
    compression: CompressionReceipt
    frames: FramesReceipt | None
    timings_s: Timings
    memory: Memory
    cache: CacheUse | None
    attempts: int
    preemptions: int = 0  # times that the last attempt paused for requests of better priority
    priority: Priority = DEFAULT_PRIORITY  # that it had, which may be less than was asked
    seed: int
    cached_tokens: int = 0  # of the prompt, whose keys and values were there already
    warnings: list[str] = []  # what the request asked and was not honoured
    kept_mask: KeptMask | None = None  # of a request that asks for it

    @property
    def policy_label(self) -> str:
        """The policy, for the labels of metrics."""
        return NO_POLICY if self.video_id is None else self.compression.policy

    @property
    def requested_label(self) -> str:
        """Who chose the policy, for the labels of metrics."""
        return REQUESTED_FIXED if self.compression.auto is None else REQUESTED_AUTO


class ErrorEvent(Message):
    type: Literal["error"] = "error"
    code: str
    message: str
    retryable: bool
    job_id: str

    @classmethod
    def of(cls, error: DycokeError, job_id: str) -> "ErrorEvent":
        return cls(code=error.code, message=error.message, retryable=error.retryable, job_id=job_id)


Event = Annotated[
    JobEvent | StatusEvent | TokenEvent | DoneEvent | ErrorEvent, Field(discriminator="type")
]
EVENT_ADAPTER: TypeAdapter[Event] = TypeAdapter(Event)
FINAL_EVENTS = (DoneEvent, ErrorEvent)

# As pydantic writes events.
_TYPE_FIRST = b'{"type":"'
_TEXT = b'"text":'
_TOKEN_IDS = b'"token_ids":['


def event_type(data: bytes) -> str:
    """The `type` of an event's JSON. Costs next to nothing unless a script of Redis wrote it."""
    if data.startswith(_TYPE_FIRST):
        start = len(_TYPE_FIRST)
        return data[start : data.index(b'"', start)].decode()
    return str(json.loads(data)["type"])


def num_tokens(data: bytes) -> int:
    """How many tokens the JSON of a `TokenEvent` has, without reading it."""
    start = data.rindex(_TOKEN_IDS) + len(_TOKEN_IDS)  # inside the text the quotes are escaped
    end = data.index(b"]", start)
    return data.count(b",", start, end) + 1 if end > start else 0


def token_text(data: bytes) -> bytes:
    """The text of a `TokenEvent` as JSON, cut out of the event's own without reading it."""
    start = data.index(_TEXT) + len(_TEXT)  # before it there are numbers alone
    return data[start : data.rindex(_TOKEN_IDS) - 1]  # as `num_tokens`
