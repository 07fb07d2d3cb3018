"""The rules by which Qwen's video processors take frames, from their source: their modules need
torchvision."""

import ast
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch


class SampleFrames(Protocol):
    def __call__(
        self,
        total: int,
        num_frames: int | None = None,
        *,
        fps: float | None = None,
        video_fps: float = 25.0,
        max_frames: int = 768,
    ) -> list[int]:
        """Indices of the frames taken out of this many."""
        ...


def sample_frames_of(family: str) -> SampleFrames:
    """A processor's rule, with its usual settings."""
    spec = find_spec(f"transformers.models.{family}.video_processing_{family}")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    (rule,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "sample_frames"
    )
    for argument in (*rule.args.args, *filter(None, [rule.args.kwarg])):
        argument.annotation = None  # which names more classes
    names: dict[str, Any] = {"np": np, "torch": torch, "math": math}
    exec(compile(ast.Module([rule], []), spec.origin, "exec"), names)

    def sample(
        total: int,
        num_frames: int | None = None,
        *,
        fps: float | None = None,
        video_fps: float = 25.0,
        max_frames: int = 768,
    ) -> list[int]:
        processor = SimpleNamespace(
            num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=max_frames
        )
        metadata = SimpleNamespace(total_num_frames=total, fps=video_fps)
        indices = names["sample_frames"](processor, metadata, num_frames=num_frames, fps=fps)
        return [int(index) for index in indices]

    return sample


sample_qwen2_vl, sample_qwen3_vl = (sample_frames_of(f"qwen{n}_vl") for n in (2, 3))
