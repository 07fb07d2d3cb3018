"""The frames that a model takes: which ones of a clip, at what size, and how they are resized.
Standard library only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from dycoke_core.errors import InvalidRequestError

MAX_ASPECT_RATIO = 200

# Which frames of a clip, as the model's own processor chooses them.
# floor: the first, the last and others evenly between, rounded down (LLaVA-OneVision; models that
#   know images alone);
# nearest: the same, rounded to the nearest frame (Qwen3-VL);
# starts: the first frame of each of as many equal parts (Qwen2.5-VL).
Spread = Literal["floor", "nearest", "starts"]
DEFAULT_SPREAD: Spread = "floor"

# How they are resized.
# decoder: while they are decoded, by FFmpeg's bicubic filter, colours at the resolution that the
#   video has them in, mostly half (LLaVA-OneVision);
# bicubic, bilinear: decoded whole, turned into RGB, then by Pillow's filter of that name, as the
#   processors of Qwen's models and of Gemma 3 do it.
Resizing = Literal["decoder", "bicubic", "bilinear"]
DEFAULT_RESIZING: Resizing = "decoder"


@dataclass(frozen=True, slots=True)
class PixelLimits:
    """
    Args:
        multiple: of which both sides are.
        min_pixels, max_pixels: of a frame, or of all frames together.
        frames_per_unit: where they are of all frames; None: of a frame.
    """

    multiple: int
    min_pixels: int
    max_pixels: int
    frames_per_unit: int | None = None

    def within(self, max_pixels: int, *, num_frames: int) -> "PixelLimits":
        """The limits of this many frames, each of which is to have at most this many pixels."""
        most = min(self.count(max_pixels, 1, num_frames), self.max_pixels)
        return replace(self, min_pixels=min(self.min_pixels, most), max_pixels=most)

    def fit(self, height: int, width: int, *, num_frames: int) -> tuple[int, int]:
        """Height and width nearest to a frame's own that keep its shape and the limits.

        Raises:
            InvalidRequestError: one side is more than 200 times the other.

        Source: `smart_resize` of Qwen2-VL's and of Qwen3-VL's processor in transformers.
        Deviation: that rule rounds a number of frames to units, halves to even ones, so an odd
            number (5, 9, 13 above all) may get more pixels than the limit; here it does not.
        """
        if self.frames_per_unit is not None and min(height, width) < self.multiple:
            scale = max(self.multiple / height, self.multiple / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise InvalidRequestError(f"frames may be at most {MAX_ASPECT_RATIO} times as long")
        fitted = self._resized(height, width, num_frames)
        if self.count(*fitted, num_frames) <= self.max_pixels:
            return fitted
        return self._shortened(
            *self._cut(height, width, self._frames_taken(num_frames)), num_frames
        )

    def count(self, height: int, width: int, num_frames: int) -> int:
        """The pixels of frames of this size that the limits are about: of whole units, where they
        are of all frames, for a last one that lacks a frame repeats one."""
        return height * width * self._frames_taken(num_frames)

    def _frames_taken(self, num_frames: int) -> int:
        if self.frames_per_unit is None:
            return 1
        return -(-num_frames // self.frames_per_unit) * self.frames_per_unit

    def _resized(self, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """As the processors do it."""
        exact = rounded = 1
        if self.frames_per_unit is not None:
            exact = max(num_frames, self.frames_per_unit)
            rounded = round(exact / self.frames_per_unit) * self.frames_per_unit
        sides = [round(side / self.multiple) * self.multiple for side in (height, width)]
        num_pixels = rounded * math.prod(sides)
        if num_pixels > self.max_pixels:
            return self._cut(height, width, exact)
        if num_pixels < self.min_pixels:
            ratio = math.sqrt(self.min_pixels / (exact * height * width))
            return self._whole(height * ratio, math.ceil), self._whole(width * ratio, math.ceil)
        return sides[0], sides[1]

    def _cut(self, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """To the most pixels that this many frames may have, unless a side would be less than one
        multiple."""
        ratio = math.sqrt(num_frames * height * width / self.max_pixels)
        sides = [self._whole(side / ratio, math.floor) for side in (height, width)]
        return max(sides[0], self.multiple), max(sides[1], self.multiple)

    def _shortened(self, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """The longer side shortened until the frames keep the limit, where the other one cannot
        be."""
        while self.count(height, width, num_frames) > self.max_pixels:
            if max(height, width) == self.multiple:
                break
            if height > width:
                height -= self.multiple
            else:
                width -= self.multiple
        return height, width

    def _whole(self, side: float, rounded: Callable[[float], int]) -> int:
        return rounded(side / self.multiple) * self.multiple


def frame_size(
    image_size: int, limits: PixelLimits | None, num_frames: int, max_pixels: int | None = None
) -> int | PixelLimits:
    """The size of a model's frames: the side of square ones, or the limits of those that keep their
    shape.

    Args:
        image_size: side of the square frames that suit the model.
        limits: the model's; None: it takes square frames alone.
        max_pixels: of each frame; None: as many as the square ones have.
    """
    if limits is None:
        return image_size
    return limits.within(max_pixels or image_size**2, num_frames=num_frames)
