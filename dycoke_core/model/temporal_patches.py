"""From frames to the patches that Qwen's vision towers take: several frames deep, merged by blocks.

Frames are of any size whose sides are multiples of the patch times the merge.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dycoke_core.errors import InvalidRequestError
from dycoke_core.model.adapter import Clip
from dycoke_core.model_frames import PixelLimits
from dycoke_core.sequence import FrameTiming

DEFAULT_FPS = 24.0


@dataclass(frozen=True, slots=True)
class TemporalPatches:
    """A processor's settings.

    Args:
        temporal: frames of a unit.
    """

    patch: int  # pixels per side
    temporal: int
    merge: int  # patches per side that become one token
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float
    limits: PixelLimits

    @classmethod
    def of_processor(
        cls, settings: Mapping[str, Any], *, limits_whole_video: bool
    ) -> "TemporalPatches":
        """
        Args:
            settings: of a video or image processor, in Hugging Face's names.
            limits_whole_video: whether its pixel limits are of all frames together.
        """
        patch, merge, size = settings["patch_size"], settings["merge_size"], settings["size"]
        return cls(
            patch=patch,
            temporal=settings["temporal_patch_size"],
            merge=merge,
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
            rescale_factor=float(settings.get("rescale_factor") or 1 / 255),
            limits=PixelLimits(
                multiple=patch * merge,
                min_pixels=settings.get("min_pixels") or size["shortest_edge"],
                max_pixels=settings.get("max_pixels") or size["longest_edge"],
                frames_per_unit=settings["temporal_patch_size"] if limits_whole_video else None,
            ),
        )

    def clip(self, shape: tuple[int, ...], timing: FrameTiming | None) -> Clip:
        """Raises InvalidRequestError: no frames, or of a size that is not the model's."""
        if len(shape) != 4 or shape[0] < 1 or shape[3] != 3:
            raise InvalidRequestError("frames must be [F, height, width, 3] with F of at least 1")
        num_frames, height, width, _ = shape
        multiple, most = self.limits.multiple, self.limits.max_pixels
        if height % multiple or width % multiple or not height * width:
            raise InvalidRequestError(
                f"frames must have sides that are multiples of {multiple}, and these have "
                f"{height} x {width}"
            )
        if self.limits.count(height, width, num_frames) > most:
            of = "each" if self.limits.frames_per_unit is None else "together"
            raise InvalidRequestError(f"frames must have at most {most} pixels {of}")
        if timing is not None and len(timing.timestamps_s) != num_frames:
            raise InvalidRequestError("the timing must have a time for each frame")
        return Clip(num_frames, height, width, timing)

    def num_units(self, num_frames: int) -> int:
        return -(-num_frames // self.temporal)

    def seconds_per_unit(self, clip: Clip) -> float:
        """Of a clip that does not say, those of 24 frames per second, as transformers takes it."""
        if clip.timing is None:
            return self.temporal / DEFAULT_FPS
        return self.temporal * clip.timing.seconds_per_frame

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches per column and row of frames of this size."""
        return height // self.patch, width // self.patch

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a unit's tokens."""
        rows, columns = self.grid(height, width)
        return rows // self.merge, columns // self.merge

    def constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of bytes, float32 [3] each. Making them waits for the
        device."""
        scale = 1.0 / self.rescale_factor
        return (
            torch.tensor(self.mean, device=device) * scale,
            torch.tensor(self.std, device=device) * scale,
        )

    def __call__(
        self, frames: Tensor, dtype: torch.dtype, constants: tuple[Tensor, Tensor]
    ) -> Tensor:
        """uint8 [units * temporal, height, width, 3] → patches, merge block after merge block.

        Returns:
            [units * rows * columns, 3 * temporal * patch * patch], normalised in float32.

        Source: `Qwen2VLVideoProcessor.patchify` and its fused rescaling in transformers.
        """
        mean, std = constants
        pixels = ((frames.float() - mean) / std).permute(0, 3, 1, 2)
        rows, columns = self.grid(*frames.shape[1:3])
        merge, patch = self.merge, self.patch
        blocks = pixels.reshape(
            *(-1, self.temporal, 3),
            *(rows // merge, merge, patch),
            *(columns // merge, merge, patch),
        )
        patches = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return patches.reshape(-1, 3 * self.temporal * patch * patch).to(dtype)
