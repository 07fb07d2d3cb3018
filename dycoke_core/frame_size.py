"""The size at which frames go into a model that takes more than one. Standard library only."""

import math
from dataclasses import dataclass, replace

from dycoke_core.errors import InvalidRequestError

MAX_ASPECT_RATIO = 200


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
        """The limits of so many frames, each of which is to have at most so many pixels."""
        most = min(max_pixels * self._frames_that_count(num_frames)[0], self.max_pixels)
        return replace(self, min_pixels=min(self.min_pixels, most), max_pixels=most)

    def fit(self, height: int, width: int, *, num_frames: int) -> tuple[int, int]:
        """Height and width nearest to a frame's own that keep its shape and the limits.

        Raises:
            InvalidRequestError: one side is more than 200 times the other.

        Source: `smart_resize` of Qwen2-VL's and of Qwen3-VL's processor in transformers.
        """
        multiple, most = self.multiple, self.max_pixels
        exact, whole = self._frames_that_count(num_frames)
        if self.frames_per_unit is not None and min(height, width) < multiple:
            scale = max(multiple / height, multiple / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise InvalidRequestError(f"frames may be at most {MAX_ASPECT_RATIO} times as long")
        fitted = round(height / multiple) * multiple, round(width / multiple) * multiple
        num_pixels = whole * fitted[0] * fitted[1]
        if num_pixels > most:
            ratio = math.sqrt(exact * height * width / most)
            return _cut(height / ratio, multiple), _cut(width / ratio, multiple)
        if num_pixels < self.min_pixels:
            ratio = math.sqrt(self.min_pixels / (exact * height * width))
            return _filled(height * ratio, multiple), _filled(width * ratio, multiple)
        return fitted

    def count(self, height: int, width: int, num_frames: int) -> int:
        """The pixels of frames of this size that the limits are about."""
        return height * width * self._frames_that_count(num_frames)[0]

    def _frames_that_count(self, num_frames: int) -> tuple[int, int]:
        """As they are, at least a unit of them, and rounded to whole units."""
        if self.frames_per_unit is None:
            return 1, 1
        num_frames = max(num_frames, self.frames_per_unit)
        return num_frames, round(num_frames / self.frames_per_unit) * self.frames_per_unit


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


def _cut(side: float, multiple: int) -> int:
    return max(multiple, math.floor(side / multiple) * multiple)


def _filled(side: float, multiple: int) -> int:
    return math.ceil(side / multiple) * multiple
