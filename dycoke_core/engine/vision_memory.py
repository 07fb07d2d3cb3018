"""How much of a device the vision tower takes while it encodes: what is set aside for it.

A micro-batch has a fixed number of units of usual size, fewer of larger ones, and at least one.
Frames above `EngineConfig.max_frame_pixels` are refused, so the largest micro-batch is known at
start. Bytes per patch are estimated from the tower's sizes, for towers as transformers runs them
with fused attention, and come out slightly above the counted ones (tested).
"""

import torch

from dycoke_core.compression.flops import VisionGeometry
from dycoke_core.config import Batching, EngineConfig
from dycoke_core.model.adapter import VideoLanguageModel

_USUAL_PATCHES = 1024  # per unit: of larger ones fewer go together


def units_per_batch(batch_units: int, patches_per_unit: int) -> int:
    """
    Args:
        batch_units: of usual size.
    """
    return max(min(batch_units, batch_units * _USUAL_PATCHES // patches_per_unit), 1)


def vision_bytes(model: VideoLanguageModel, config: EngineConfig, batching: Batching) -> int:
    """What the largest micro-batch holds at once."""
    batch_units = max(batching.vision_batch_frames // model.frames_per_unit, 1)
    vision = model.vision_geometry(model.image_size, model.image_size)
    if model.frame_limits is None:
        num_patches = units_per_batch(batch_units, vision.num_patches) * vision.num_patches
    else:
        most_pixels = max_frame_pixels(model, config)
        largest = -(-most_pixels * vision.num_patches // model.image_size**2)
        num_patches = max(batch_units * _USUAL_PATCHES, largest)
    return num_patches * patch_bytes(vision, model.dtype)


def max_frame_pixels(model: VideoLanguageModel, config: EngineConfig) -> int:
    """The most that a frame may have: frames of the size that suits the model are always taken."""
    return max(config.max_frame_pixels, model.image_size**2)


def patch_bytes(vision: VisionGeometry, dtype: torch.dtype) -> int:
    """Bytes that a micro-batch holds of a patch where it holds most."""
    size, width = dtype.itemsize, vision.hidden_size
    pixels = vision.patch_inputs * (1 + 2 * torch.float32.itemsize)  # as read, and normalised
    # Residual, norm, queries, keys, values, attention's output and two in between; where they are
    # rotated, queries and keys with what that takes in float32.
    attention = width * (8 * size + (8 * torch.float32.itemsize if vision.is_rotary else 0))
    mlp = size * (10 * width + vision.num_mlp_matrices * vision.intermediate_size)
    projector = size * vision.projector_values
    inputs = vision.patch_inputs * size  # held until the end
    return int(inputs + max(pixels, attention, mlp, projector))
