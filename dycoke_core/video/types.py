"""What is asked of the frame readers, what they answer, and the limits they keep to."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from dycoke_core.errors import InvalidRequestError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ReaderName = Literal["decord", "pyav"]
# What became of a task that brought no result. What its child reported of the video:
#   no_video, unknown_codec, unreadable, too_many_frames; that the allocator refused it: memory;
# how the child ended: timeout, memory, cpu, crash (a signal of its own doing), killed (from
#   outside), exception (a Python error, or a reply that no honest child sends);
# that there was none: no_process.
FailureCode = Literal[
    "no_video",
    "unknown_codec",
    "unreadable",
    "too_many_frames",
    "timeout",
    "memory",
    "cpu",
    "crash",
    "killed",
    "exception",
    "no_process",
]
Sampling = Literal["uniform", "keyframe"]

SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)

MAX_FRAMES = 1024
MAX_IMAGE_SIZE = 1024


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """What one upload may cost. The last five bound a child whatever the file says of itself.

    `max_pixels` is DCI 4K with room for its padding; UHD fits either way up. An 8K frame takes
    50 MB in the decoder, sixteen of which a stream may ask to be kept, and one core decodes twenty
    empty ones per second: real footage ends in a timeout, so it is refused at once.
    """

    max_pixels: int = 4096 * 2304
    max_duration_s: float = 2 * 3600.0
    max_source_frames: int = 500_000  # two hours at 60 frames per second, and some
    max_extradata_bytes: int = 2**20  # parameter sets; a few hundred bytes in real files
    timeout_s: float = 30.0  # all children of one upload together, waiting for a place excluded
    probe_timeout_s: float = 10.0
    decord_share: float = 0.6  # of the time left, before PyAV gets its turn
    cpu_s: int = 20  # per child, for each thread that it may decode with
    memory_bytes: int = 2 * 2**30  # address space of a child


@dataclass(frozen=True, slots=True)
class FrameSpec:
    """Which frames are wanted: `num_frames` of size S x S, spread evenly over the clip.

    The clip runs from the frame on screen at `start_s` to the last one that begins before `end_s`.
    With the sampling `keyframe` only its keyframes count, which decode without any other: hours of
    video are read in a moment, at times that are the encoder's choice. Where there are fewer than
    frames wanted they are repeated; where there is none the sampling is `uniform`. Either comes
    with a warning.

    Raises:
        InvalidRequestError: a value outside its range.
    """

    num_frames: int
    image_size: int
    start_s: float | None = None
    end_s: float | None = None
    sampling: Sampling = "uniform"

    def __post_init__(self) -> None:
        if not 1 <= self.num_frames <= MAX_FRAMES:
            raise InvalidRequestError(f"num_frames must be between 1 and {MAX_FRAMES}")
        if not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise InvalidRequestError(f"image_size must be between 1 and {MAX_IMAGE_SIZE}")
        if self.sampling not in SAMPLINGS:
            raise InvalidRequestError(f"sampling must be one of {', '.join(SAMPLINGS)}")
        for name in ("start_s", "end_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InvalidRequestError(f"{name} must be a number of seconds, 0 or more")
        if self.end_s is not None and self.end_s <= (self.start_s or 0.0):
            raise InvalidRequestError("end_s must be greater than start_s")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.num_frames, self.image_size, self.image_size, 3)


@dataclass(frozen=True, slots=True)
class VideoProbe:
    """What the file's headers say; nothing has been decoded. None where they say nothing."""

    container: str
    codec: str
    width: int  # as stored; a rotation for display is not applied
    height: int
    duration_s: float | None
    num_frames: int | None
    fps: float | None


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrames:
    """F frames and where they come from.

    `indices` count the video's frames in the order of display, from 0; `timestamps_s` are the
    container's presentation times less that of frame 0. A frame that does not decode is replaced by
    the next one that does, under that one's index and time, with a warning.
    """

    pixels: "npt.NDArray[np.uint8]"  # [F, S, S, 3] RGB, upright
    indices: tuple[int, ...]
    timestamps_s: tuple[float, ...]
    reader: ReaderName
    warnings: tuple[str, ...]
    fallback_cause: FailureCode | None = None  # why decord, which was to read them, did not
