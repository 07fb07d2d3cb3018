"""How an engine's memory is divided: how much keys and values may take, on the device and in host
memory, and how much is reserved for the vision tower. Decided once, at start.

A micro-batch of the tower has a fixed number of units of the usual size, fewer of larger ones, and
at least one. Frames above `EngineConfig.max_frame_pixels` are refused, so the largest micro-batch
is known at start. Bytes per patch are estimated from the tower's sizes, for towers with fused
attention as in transformers, and are slightly above the counted ones (tested).
"""

import os
from pathlib import Path

import torch

from dycoke_core.compression.flops import TextGeometry, VisionGeometry
from dycoke_core.config import Batching, EngineConfig
from dycoke_core.model.adapter import VideoLanguageModel

_GPU_SHARE = 0.85  # of what is free once the weights are loaded; the rest is for fragments
_CPU_SHARE = 0.25  # of what is available: other processes live here too
_CPU_MAX_BYTES = 8 * 2**30
_USUAL_PATCHES = 1024  # per unit: of larger ones fewer go together

# The control group's limit and use, as a container sees its own: of version 2, and of version 1.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def row_bytes(geometry: TextGeometry, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in one layer."""
    return 2 * geometry.num_kv_heads * geometry.head_size * dtype.itemsize


def gpu_kv_budget_bytes(model: VideoLanguageModel, config: EngineConfig, batching: Batching) -> int:
    """Where no setting says it: a share of the device's free memory now that the model is loaded,
    less what passes, the vision tower and visual features take."""
    free_bytes, _ = torch.cuda.mem_get_info(model.device)
    share = int(free_bytes * _GPU_SHARE / config.engines_per_device)
    taken = pass_bytes(model, batching) + vision_bytes(model, config, batching)
    return max(share - config.feature_cache_bytes - taken, 0)


def cpu_kv_budget_bytes(config: EngineConfig) -> int:
    """The setting, else a share of the available memory; passes, the vision tower and features live
    in the rest."""
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    share = int(available_bytes() * _CPU_SHARE)
    return min(share, _CPU_MAX_BYTES) // config.engines_per_device


def host_budget_bytes(config: EngineConfig) -> int:
    """The setting, else a share of the host's available memory. On a CPU it adds to the KV's."""
    if config.host_cache_bytes is not None:
        return config.host_cache_bytes
    return int(available_bytes() * _CPU_SHARE) // config.engines_per_host


def pass_bytes(model: VideoLanguageModel, batching: Batching) -> int:
    """What the largest pass holds at once: an MLP's three products, and rows of the layer's width.

    Those are residual, norm, queries, keys, values, attention's output and two in between.
    """
    geometry = model.text_geometry
    num_rows = batching.max_prompt_tokens_per_pass + batching.max_running_sequences
    row = 3 * geometry.intermediate_size + 8 * geometry.hidden_size
    return num_rows * row * model.dtype.itemsize


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


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process could take: the machine's, or what its control group leaves it.

    Page cache counts as available: the kernel gives it up.
    """
    available = _fields(root / "proc/meminfo").get("MemAvailable:", 0) * 1024
    if not available:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for names in _CGROUPS:
        limit, used, stat = (root / "sys/fs/cgroup" / name for name in names)
        if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
            in_use = int(used.read_text()) - _fields(stat).get("inactive_file", 0)
            available = min(available, int(text) - in_use)
    return max(available, 0)


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number, with or without a unit."""
    lines = path.read_text().splitlines() if path.is_file() else []
    words = [line.split() for line in lines]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}
