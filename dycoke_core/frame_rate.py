"""How many frames of a clip are taken for a rate, counted as a model's video processor does.
Standard library only.
"""

import math
from dataclasses import dataclass

# Where a checkpoint's settings say nothing.
PROCESSORS_MIN_FRAMES, PROCESSORS_MAX_FRAMES = 4, 768


@dataclass(frozen=True, slots=True)
class RateRule:
    """
    Args:
        min_frames: taken however short a clip is, of one that has so many.
        max_frames: taken at most.
        multiple: of which the number is, rounded down.
    """

    min_frames: int
    max_frames: int
    multiple: int

    def count(self, wanted: float, *, given: float, most: float) -> int:
        """How many frames to take, at least one.

        Args:
            wanted: the clip's frames, divided by its own rate, times the rate asked for.
            given: frames that the clip has; infinite where it is not known.
            most: that may be taken in any case.

        Source: `sample_frames` of Qwen2-VL's and of Qwen3-VL's video processor in transformers.
        Deviation: a clip of one frame, of which the first makes none and fails.
        """
        num_frames = min(max(wanted, self.min_frames), self.max_frames, given, most)
        return max(math.floor(num_frames / self.multiple) * self.multiple, 1)
