"""What frame readers are asked for, what they return, and their limits."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from dycoke_core.errors import InvalidRequestError
from dycoke_core.model_frames import DEFAULT_RESIZING, DEFAULT_SPREAD, PixelLimits, Resizing, Spread

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ReaderName = Literal["decord", "pyav"]
# Why a task has no result. The child reported on the video:
#   no_video, unknown_codec, unreadable, too_many_frames;
# it reported that an allocation was refused: memory;
# the child ended: timeout, memory, cpu, crash (a signal that it caused), killed (from outside),
#   exception (a Python error, or a reply that no honest child sends);
# there was no child: no_process.
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
MAX_PIXEL_BYTES = 480 * 2**20  # of one clip's frames: a value in Redis has at most 512 MiB


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """What one upload may cost. The last five bound a child whatever the file claims.

    `max_pixels` is DCI 4K with room for its padding; UHD fits either way up. An 8K frame takes
    50 MB in the decoder, a stream may require sixteen of them to be kept, and one core decodes
    twenty empty ones per second: real 8K footage would time out, so it is refused at once.
    """

    max_pixels: int = 4096 * 2304
    max_duration_s: float = 2 * 3600.0
    max_source_frames: int = 500_000  # a little over two hours at 60 frames per second
    max_extradata_bytes: int = 2**20  # parameter sets; a few hundred bytes in real files
    timeout_s: float = 30.0  # for all children of one upload, without the wait for a slot
    probe_timeout_s: float = 10.0
    decord_share: float = 0.6  # of the time left, before PyAV gets its turn
    cpu_s: int = 20  # per child and decoding thread
    memory_bytes: int = 2 * 2**30  # address space of a child


@dataclass(frozen=True, slots=True)
class FrameSpec:
    """Which frames are wanted: `num_frames` of one size, spread evenly over the clip.

    The clip runs from the frame on screen at `start_s` to the last one that begins before `end_s`.
    The sampling `keyframe` takes only keyframes, which decode on their own: hours of video are read
    in a moment, at times that the encoder chose. If there are fewer keyframes than frames wanted,
    they are repeated; if there are none, the sampling is `uniform`. Both give a warning.

    Args:
        image_size: side of square frames, in pixels, whatever the video's shape; or the limits
            within which frames keep it.
        spread: where they stand in the clip, or among its keyframes.
        resizing: how they are resized.

    Raises:
        InvalidRequestError: a value outside its range.
    """

    num_frames: int
    image_size: int | PixelLimits
    start_s: float | None = None
    end_s: float | None = None
    sampling: Sampling = "uniform"
    spread: Spread = DEFAULT_SPREAD
    resizing: Resizing = DEFAULT_RESIZING

    def __post_init__(self) -> None:
        if not 1 <= self.num_frames <= MAX_FRAMES:
            raise InvalidRequestError(f"num_frames must be between 1 and {MAX_FRAMES}")
        side = self.image_size
        if not isinstance(side, PixelLimits) and not 1 <= side <= MAX_IMAGE_SIZE:
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
    def keeps_shape(self) -> bool:
        """Whether the frames' size depends on the video's."""
        return isinstance(self.image_size, PixelLimits)

    def shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """[F, height, width, 3] of the frames of a video.

        Args:
            height, width: the video's, in pixels. The number of bytes is the same for one that is
                turned by 90 degrees.

        Raises:
            InvalidRequestError: a shape that the model does not take, or too many pixels.
        """
        if isinstance(self.image_size, PixelLimits):
            size = self.image_size.fit(height, width, num_frames=self.num_frames)
        else:
            size = (self.image_size, self.image_size)
        shape = (self.num_frames, *size, 3)
        if math.prod(shape) > MAX_PIXEL_BYTES:
            raise InvalidRequestError(
                f"num_frames {self.num_frames} of {size[1]} x {size[0]} pixels are more than one "
                "request may have: take fewer, or smaller ones"
            )
        return shape


@dataclass(frozen=True, slots=True)
class VideoProbe:
    """What the file's headers say, without decoding; None where they say nothing."""

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

    `indices` count the video's frames in display order, from 0; `timestamps_s` are the container's
    presentation times minus that of frame 0. A frame that does not decode is replaced by the next
    one that does, with that one's index and time and a warning.
    """

    pixels: "npt.NDArray[np.uint8]"  # [F, height, width, 3] RGB, upright
    indices: tuple[int, ...]
    timestamps_s: tuple[float, ...]
    reader: ReaderName
    warnings: tuple[str, ...]
    shown_s: float | None = None  # how long the clip that they were taken from is
    fallback_cause: FailureCode | None = None  # why decord, tried first, did not read them
