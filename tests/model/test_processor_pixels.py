"""Frames as they are read, as tensors: bit for bit what the models' own processors make of them.

The processors of images that need no torchvision run here. Those of videos do not: torch's own
resizing, which torchvision calls, stands for theirs.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dycoke_core.errors import ModelLoadError
from dycoke_core.model.checkpoint import Checkpoint
from dycoke_core.model.loader import load_model
from dycoke_core.model.qwen2_5_vl import Qwen25VL
from dycoke_core.model.temporal_patches import TemporalPatches
from dycoke_core.preprocess import FrameNormalizer, resizing_of_processor
from dycoke_core.video import FrameSpec, read_video_frames
from tests.pictures import frame_list, painted, saved
from tests.random_gemma import build_random_gemma3
from tests.random_qwen import build_random_qwen2_5_vl, build_random_qwen3_vl

HEIGHT, WIDTH = 250, 431
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scene() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return painted(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def file(
    scene: np.ndarray[Any, np.dtype[np.uint8]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("list") / "scene"
    path.write_bytes(frame_list([saved(scene)]))
    return path


@pytest.mark.parametrize("side", [112, 448])
def test_gemmas_are_its_image_processors(side: int, scene: Any, file: Path) -> None:
    processor = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    resizing = resizing_of_processor({"resample": int(processor.resample)}, default="bicubic")
    frames = read_video_frames(file, FrameSpec(1, side, resizing=resizing)).pixels
    pixels = FrameNormalizer.of_processor({})(torch.from_numpy(frames), torch.float32)
    expected = torch.as_tensor(np.array(processor(scene)["pixel_values"]))
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [112, 448])
def test_qwens_are_its_image_processors(side: int, scene: Any, file: Path) -> None:
    """For an image the processor repeats it in time."""
    budget = {"shortest_edge": side**2 // 2, "longest_edge": side**2}
    settings = Qwen25VL.processor_defaults | {"size": budget}
    patches, frames = read_as(settings, file)
    processor = Qwen2VLImageProcessorPil(**settings)
    expected = torch.as_tensor(np.array(processor(scene)["pixel_values"]))
    pixels = patches(
        torch.from_numpy(frames).repeat(2, 1, 1, 1), torch.float32, patches.constants(CPU)
    )
    torch.testing.assert_close(pixels, expected.view_as(pixels), rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [112, 448])
def test_frames_are_within_two_levels_of_torchs_resizing(side: int, scene: Any, file: Path) -> None:
    budget = {"shortest_edge": side**2 // 2, "longest_edge": side**2}
    _, frames = read_as(Qwen25VL.processor_defaults | {"size": budget}, file)
    whole: Tensor = torch.from_numpy(scene).permute(2, 0, 1)[None]
    expected = interpolate(whole, size=frames.shape[1:3], mode="bicubic", antialias=True)
    difference = expected[0].permute(1, 2, 0).short() - torch.from_numpy(frames[0]).short()
    assert difference.abs().max() <= 2


def read_as(settings: Mapping[str, Any], file: Path) -> tuple[TemporalPatches, Any]:
    """A processor's patches, and the frame in a file as the service reads it for them."""
    patches = TemporalPatches.of_processor(settings, limits_whole_video=False)
    resizing = resizing_of_processor(settings, default="bicubic")
    spec = FrameSpec(1, patches.limits, resizing=resizing)
    return patches, read_video_frames(file, spec).pixels


def test_a_filter_that_readers_do_not_have_is_refused() -> None:
    assert resizing_of_processor({"resample": 2}, default="bicubic") == "bilinear"
    assert resizing_of_processor({"resample": None}, default="bicubic") == "bicubic"
    for resample in (0, 1, 17, "bicubic", [3]):
        with pytest.raises(ModelLoadError, match="filter that is not supported"):
            resizing_of_processor({"resample": resample}, default="bicubic")


@pytest.mark.parametrize(
    ("build", "file"),
    [
        (build_random_qwen2_5_vl, "preprocessor_config.json"),
        (build_random_qwen3_vl, "video_preprocessor_config.json"),
        (build_random_gemma3, "preprocessor_config.json"),
    ],
    ids=["qwen2_5_vl", "qwen3_vl", "gemma3"],
)
def test_it_is_refused_before_weights_are_read(
    build: Callable[[Path], None], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    said = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(said | {"resample": 1}))
    reads: list[object] = []
    monkeypatch.setattr(Checkpoint, "load_weights", lambda _, of: reads.append(of))
    with pytest.raises(ModelLoadError, match="filter that is not supported: 1"):
        load_model(tmp_path, device="cpu", dtype="float32")
    assert reads == []
