"""What goes into the engine and what comes out of it: `Sequence`, `TokenEvent`, `SequenceReport`.

Knows no HTTP, no Redis and no device. The engine's own state for a sequence (cache, scores) is in
`dycoke_core.engine`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal

from dycoke_core.config import PRIORITIES, CompressionConfig, Priority
from dycoke_core.errors import DycokeError, InvalidRequestError
from dycoke_core.kept_sets import KeptHistory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Role = Literal["system", "user", "assistant"]

# Of the definition by which tokens are drawn (`dycoke_core.engine.sampler`). Under another version
# the same seed may draw another answer at a temperature above 0; greedy answers are the same.
# 1: nucleus by sorting, inverse CDF in descending order. 2: nucleus by threshold, vocabulary order.
SAMPLER_VERSION = 2


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Role
    content: str


class FinishReason(StrEnum):
    STOP = "stop"  # end-of-sequence token or stop string
    LENGTH = "length"  # max_tokens
    ERROR = "error"


class Stage(StrEnum):
    """Where a sequence is; owned by the engine."""

    WAITING = "waiting"
    ENCODING = "encoding"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The random number of token i depends on `seed` and i alone.

    Raises:
        InvalidRequestError: a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # an end-of-sequence token does not end the answer

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidRequestError("max_tokens must be at least 1")
        if not 0.0 <= self.temperature <= 2.0:
            raise InvalidRequestError("temperature must be between 0 and 2")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError("top_p must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise InvalidRequestError("seed must be between 0 and 2**63 - 1")
        if any(not text for text in self.stop):
            raise InvalidRequestError("stop strings must not be empty")


@dataclass(frozen=True, slots=True)
class FrameTiming:
    """When a video's frames are shown, for models whose positions or prompts tell the time.

    Args:
        timestamps_s: of each frame, ascending.
        duration_s: of the video, or of the part that the frames were spread over; None: as many
            times the frames' mean distance as there are frames.

    Raises:
        InvalidRequestError: times that are no numbers, negative or not ascending.
    """

    timestamps_s: tuple[float, ...]
    duration_s: float | None = None

    def __post_init__(self) -> None:
        times = self.timestamps_s
        if not all(math.isfinite(time) and time >= 0 for time in times):
            raise InvalidRequestError("timestamps must be numbers of seconds, 0 or more")
        if any(after < before for before, after in pairwise(times)):
            raise InvalidRequestError("timestamps must ascend")
        if self.duration_s is not None and not 0 < self.duration_s < math.inf:
            raise InvalidRequestError("a video's duration must be above 0 seconds")

    @classmethod
    def shown_at(cls, times: Iterable[float], shown_s: float | None = None) -> "FrameTiming":
        """Of frames as a reader gives their times. Those that a container gets wrong are held at
        the last one before.

        Args:
            shown_s: how long the clip is, if that is known.
        """
        held = tuple(accumulate((max(time, 0.0) for time in times), max))
        return cls(held, duration_s=shown_s or None)

    @property
    def seconds_per_frame(self) -> float:
        """Of the video for each of the frames; 0 where a single frame says nothing of it."""
        times = self.timestamps_s
        if self.duration_s is not None:
            return self.duration_s / len(times)
        return (times[-1] - times[0]) / max(len(times) - 1, 1)


@dataclass(frozen=True, slots=True)
class FrameContent:
    """The content of frames, as far as it is known without a model.

    Args:
        key: names their content.
        distinct_units: those that differ from the unit before.
        unit_sources: for each unit, its place among the distinct ones.
    """

    key: str
    distinct_units: tuple[int, ...]
    unit_sources: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Sequence:
    """One question about one video, or about none, as the engine takes it.

    Args:
        sequence_id: unique among the sequences that the engine holds.
        messages: the conversation, ending with a user turn.
        frames: uint8 [F, height, width, 3], RGB, already of a size that the model takes. None: a
            conversation without a video, to which `compression` does not apply.
        video_turn: index of the user turn that the video belongs to; None: the first one.
        forced_token_ids: ids that an earlier attempt has published. They are run through the
            ordinary decode path, emit no events, and the answer continues after them.
        timing: of the frames; None: models that tell the time take them as of 24 a second.
        video_key: names the frames' content, for what is kept per video; None: hashed from them.
        video_name: of the video, however many keys it has, for `Engine.forget_video`.
        wants_kept_sets: the report says which visual tokens were kept at each token.
        priority: sequences of a better one go first, see `dycoke_core.precedence`.
        can_reload_frames: its owner will bring its frames again if the engine asks for them
            (`Engine.waiting_for_frames`). The engine then sets `frames` to None when the sequence
            is admitted: from then on they are held only until the video is encoded.

    Raises:
        InvalidRequestError: no such priority.
    """

    sequence_id: str
    messages: tuple[ChatMessage, ...]
    frames: "npt.NDArray[np.uint8] | None"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    forced_token_ids: tuple[int, ...] = ()
    video_key: str | None = None
    timing: FrameTiming | None = None
    video_turn: int | None = None
    video_name: str | None = None
    wants_kept_sets: bool = False
    priority: Priority = "normal"
    can_reload_frames: bool = False
    # Set by `frame_content.content_of`.
    frame_content: FrameContent | None = None
    # Set by the engine.
    stage: Stage = Stage.WAITING
    progress: float = 0.0  # share of the stage that is done
    is_weighed: bool = False  # policy `auto` has counted what it takes
    output_token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.priority not in PRIORITIES:
            raise InvalidRequestError(f"priority must be one of: {', '.join(PRIORITIES)}")


@dataclass(frozen=True, slots=True)
class CompressionReport:
    """What compression kept. Counts are exact; the newline is in none of them.

    Without a video nothing is kept of nothing: counts are 0 and ratios None. `exact_flops_actual`
    leaves out what was reused: cached features and prefixes, repeated frames.

    Source: DYCOKE "Ratios to report"; `decode` is the paper's "retained ratio".
    """

    units: int  # of the video: frames, or temporal patches of several
    tokens_per_unit: int  # N
    rows: int  # of the grid that a unit's tokens stand in
    columns: int
    visual_tokens_in: int  # F * N, or units * N
    visual_tokens_prefill: int  # V
    visual_tokens_decode: int  # n_keep, in each pruned layer
    pruned_layers: tuple[int, ...]  # that stage II touches
    retained_ratio_prefill: float | None
    retained_ratio_decode: float | None
    retained_ratio_decode_all_layers: float | None
    kept_per_frame: tuple[int, ...]  # [F], after stage I; by units where they are not frames
    decode_steps: int
    refreshes: int
    paper_flops_full: float
    paper_flops_actual: float
    exact_flops_full: float
    exact_flops_actual: float


@dataclass(frozen=True, slots=True)
class TimingReport:
    """Seconds, measured by the engine from `add` on. No `per_output_token_s` below 2 tokens."""

    waiting_s: float
    vision_s: float
    compress_s: float
    prefill_s: float
    first_token_s: float  # from add to the first new token
    decode_s: float
    per_output_token_s: float | None


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes when the sequence ended, except the peak."""

    kv_bytes: int  # slots in use by what decode attends to
    dp_cache_bytes: int  # visual keys and values held for refreshes
    kv_bytes_full_tokens: int  # what the same answer would hold without compression (by count)
    peak_device_bytes: int  # allocated on the device while the sequence ran; on a CPU peak RSS


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What the sequence found done, or under way, when it was first admitted. A prefix holds
    features."""

    has_features_hit: bool
    has_prefix_hit: bool


@dataclass(frozen=True, slots=True)
class SequenceReport:
    """The engine's part of a receipt."""

    prompt_tokens: int  # with V visual tokens and the newline
    completion_tokens: int
    text: str
    compression: CompressionReport
    timings: TimingReport
    memory: MemoryReport
    cache: CacheReport
    cached_tokens: int = 0  # of the prompt, whose keys and values were there already
    kept: KeptHistory | None = None  # of a sequence with a video that wants it
    preemptions: int = 0  # times that it made room for one of better priority, and was replayed


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step's outcome for one sequence.

    `text` is what became printable with this token; it may be empty (half a character, a possible
    stop string, the end-of-sequence token). The last event of a sequence has a `finish_reason` and
    either a `report` or, for FinishReason.ERROR, an `error` and no tokens.
    """

    sequence_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    report: SequenceReport | None = None
    error: DycokeError | None = None
    prompt_tokens: int | None = None  # with an answer's first token: of its prompt
