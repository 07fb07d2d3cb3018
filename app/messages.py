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
    """The parameters of a `RateRule`: how many frames a rate makes."""

    min_frames: int
    max_frames: int
    multiple: int

    def rule(self) -> RateRule:
        return RateRule(**self.model_dump())


class FramesWanted(Message):
    """Which frames to read; any API process may be the reader."""

    num_frames: int
    image_size: int
    limits: FrameLimits | None = None  # for frames that keep their shape; None: frames are square
    start_s: float | None = None
    end_s: float | None = None
    sampling: Sampling = "uniform"  # default for earlier releases
    spread: Spread = DEFAULT_SPREAD  # default for earlier releases
    fps: float | None = None  # if `num_frames` was counted by a rate
    resizing: Resizing = DEFAULT_RESIZING  # default for earlier releases


class FramesRef(Message):
    """Which frames a job is about, and where their pixels are in the frame store."""

    digest: str  # key of the blob: content, sampling and size
    num_frames: int
    image_size: int
    height: int = 0  # in pixels, as read; 0 from earlier releases
    width: int = 0
    indices: list[int]
    timestamps_s: list[float]
    reader: str  # decord or pyav
    warnings: list[str] = []
    sampling: Sampling = "uniform"  # default for earlier releases
    start_s: float | None = None  # the clip's, as it was read
    end_s: float | None = None
    fps: float | None = None  # if `num_frames` was counted by a rate
    is_cached: bool  # found in the frame store


class JobRequest(Message):
    """A job with all defaults resolved at admission: nothing depends on the worker that runs it."""

    version: int = WIRE_VERSION
    job_id: str
    owner: str = ANONYMOUS  # default for earlier releases
    cache_salt: str = ""  # jobs with another salt cannot find this one's frames and features
    model: str
    video_id: str | None  # None: a conversation without a video
    messages: list[Turn]
    video_turn: int | None = None  # index of the video's turn; None: the user's first
    frames_wanted: FramesWanted | None = None  # None from earlier releases
    frames: FramesRef | None = None  # None while the frames are being read
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: list[str]
    ignore_eos: bool = False
    compression: dict[str, Any]
    priority: Priority = DEFAULT_PRIORITY  # default for earlier releases
    deadline_s: float | None = None  # from acceptance, if the client has set it
    warnings: list[str] = []  # for the receipt: what was asked but is not honoured
    kept_mask: bool = False  # the receipt says which visual tokens were kept
    tells_prompt_tokens: bool = False  # together with the first token
    # What the answer's numerics depend on, from the model card at admission.
    weights_digest: str
    dtype: str
    prefill_chunk_tokens: int
    sampler_version: int = 1  # default for earlier releases
    accepted_at_s: float  # Unix time
    deadline_at_s: float  # Unix time; the client's, or by `JOB_TIMEOUT_S`
    upload_s: float = 0.0
    read_frames_s: float = 0.0
    traceparent: str | None = None  # the span that it belongs to, in W3C's format

    @property
    def cached_video(self) -> str | None:
        """The name under which its video's frames and features are cached; None without a video."""
        return None if self.video_id is None else cached_video(self.video_id, self.cache_salt)

    @property
    def log_fields(self) -> dict[str, str]:
        """The structured log fields of lines about this job."""
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
    """The name of a video in caches, one per salt."""
    return f"{cache_salt}:{video_id}" if cache_salt else video_id


class ModelCard(Message):
    """What a worker serves; published with a heartbeat, read by every API."""

    version: int = WIRE_VERSION
    worker_id: str
    model: str
    weights_digest: str
    device: str
    dtype: str
    image_size: int  # side of square frames, in pixels
    frame_limits: FrameLimits | None = None  # for frames that keep their shape
    frame_spread: Spread = DEFAULT_SPREAD  # default for earlier releases
    frame_rate: FrameRate | None = None  # None: length times rate, rounded down
    frame_resizing: Resizing = DEFAULT_RESIZING  # default for earlier releases
    tokens_per_frame: int  # N, of a unit of square frames
    frames_per_unit: int = 1  # default for earlier releases
    max_words_per_token: int | None = None  # None from earlier releases; see `EngineCard`
    num_layers: int
    max_model_tokens: int
    prefill_chunk_tokens: int
    sampler_version: int = 1  # default for earlier releases
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
    """Why policy `auto` chose the compression that the receipt names."""

    objective_s: float
    at_least: float
    level: int  # in the ladder; 0 compresses least
    num_levels: int
    reason: str  # a `Reason`; another release may have more of them
    predicted_ttft_s: float  # compare with `timings_s.ttft`


class CompressionReceipt(Message):
    policy: str
    parameters: dict[str, Any]
    auto: AutoReceipt | None = None  # None: the request named the policy
    visual_tokens_in: int
    visual_tokens_prefill: int
    visual_tokens_decode: int
    # 0 from earlier releases, and without a video.
    units: int = 0  # what the model turns into visual tokens: frames, or groups of frames
    tokens_per_unit: int = 0  # N, in `rows` rows of `columns`
    rows: int = 0
    columns: int = 0
    pruned_layers: list[int] = []  # layers that attend to `visual_tokens_decode`; 0 is the first
    retained_ratio: RetainedRatio | None  # None without a video
    kept_per_frame: list[int]
    decode_steps: int
    refreshes: int
    flops: FlopsByFormula


class FramesReceipt(Message):
    indices: list[int]
    timestamps_s: list[float]
    height: int = 0  # pixels, as the model saw them; 0 from earlier releases
    width: int = 0
    reader: str
    warnings: list[str]
    sampling: Sampling = "uniform"  # default for earlier releases
    start_s: float | None = None  # of the clip, as it was read
    end_s: float | None = None
    fps: float | None = None  # the rate that was asked for, if any

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
    stage1: str  # the tokens that went into the language model
    stage2: str | None  # those of the last decode step, a subset; None if stage II is off


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
    # What policy `auto` chose; in all events from then on.
    auto: CompressionChoice | None = Field(None, exclude_if=lambda value: value is None)


class TokenEvent(Message):
    type: Literal["token"] = "token"
    index: int
    text: str
    token_ids: list[int]
    # With the first token of an answer, if the request asks for it; left out otherwise.
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
    preemptions: int = 0  # how often the last attempt paused for requests of higher priority
    priority: Priority = DEFAULT_PRIORITY  # the one that it had, which may be lower than requested
    seed: int
    cached_tokens: int = 0  # prompt tokens whose keys and values were already cached
    warnings: list[str] = []  # what the request asked for but did not get
    kept_mask: KeptMask | None = None  # if the request asks for it

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

# Pydantic writes events like this.
_TYPE_FIRST = b'{"type":"'
_TEXT = b'"text":'
_TOKEN_IDS = b'"token_ids":['


def event_type(data: bytes) -> str:
    """The `type` of an event's JSON. Cheap, unless a script of Redis wrote it."""
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
    start = data.index(_TEXT) + len(_TEXT)  # only numbers come before it
    return data[start : data.rindex(_TOKEN_IDS) - 1]  # as `num_tokens`
