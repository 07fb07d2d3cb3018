"""Memory that is reserved for the vision tower, against tensors counted on a CPU."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dycoke_core.config import Batching, EngineConfig
from dycoke_core.engine.budget import patch_bytes, units_per_batch, vision_bytes
from dycoke_core.errors import InvalidRequestError
from dycoke_core.model.loader import load_model
from dycoke_core.model.qwen2_5_vl import Qwen25VL
from dycoke_core.sequence import ChatMessage, SamplingParams, Sequence
from tests.engine.live_bytes import LiveBytes
from tests.engine.recording import RecordingEngine, report_of
from tests.random_checkpoint import SMALL_SHAPE, build_random_checkpoint
from tests.random_gemma import build_random_gemma3
from tests.random_qwen import build_random_qwen2_5_vl, build_random_qwen3_vl

# As wide as it takes for layers to hold more than the pixels that go in.
WIDE = {"hidden_size": 512, "intermediate_size": 2048}
WIDE_SHAPE = replace(SMALL_SHAPE, vision_hidden_size=512)
FAMILIES: Mapping[str, Callable[[Path], None]] = {
    "llava_onevision": lambda path: build_random_checkpoint(path, shape=WIDE_SHAPE),
    "gemma3": lambda path: build_random_gemma3(path, of_vision=WIDE),
    "qwen2_5_vl": lambda path: build_random_qwen2_5_vl(path, **WIDE),
    "qwen3_vl": lambda path: build_random_qwen3_vl(path, **WIDE),
}


@pytest.fixture(scope="module", params=FAMILIES)
def wide_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("wide") / str(request.param)
    FAMILIES[request.param](directory)
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_patch_takes_what_is_counted_and_a_little_more(
    dtype: str, wide_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Packed weights are a CPU's own, and what they are multiplied into cannot be counted.
    monkeypatch.setattr("dycoke_core.model.checkpoint.can_pack", lambda device, dtype: False)
    model = load_model(wide_checkpoint, device="cpu", dtype=dtype)
    limits, size = model.frame_limits, (model.image_size, model.image_size)
    if limits is not None:
        size = (4 * limits.multiple, 6 * limits.multiple)
    vision, num_units = model.vision_geometry(*size), 4
    with torch.inference_mode(), LiveBytes() as counted:
        shape = (num_units * model.frames_per_unit, *size, 3)
        *_, features = model.encode_frames(torch.zeros(shape, dtype=torch.uint8))
    assert features is not None and len(features) == num_units
    per_patch = counted.peak / (num_units * vision.num_patches)
    assert per_patch <= patch_bytes(vision, model.dtype) <= 1.8 * per_patch


@given(batch_units=st.integers(1, 64), patches=st.integers(1, 2**17))
def test_no_batch_is_larger_than_that_of_usual_units_or_one_unit(
    batch_units: int, patches: int
) -> None:
    num_units = units_per_batch(batch_units, patches)
    assert 1 <= num_units <= batch_units
    assert num_units == 1 or num_units * patches <= batch_units * 1024


# --- in an engine ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen25VL:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("random") / "qwen2_5_vl"
    build_random_qwen2_5_vl(directory)
    model = load_model(directory, device="cpu", dtype="float32")
    assert isinstance(model, Qwen25VL)
    return model


def asked(name: str, side: int, num_frames: int = 4) -> Sequence:
    pixels = np.random.default_rng(side).integers(0, 256, (num_frames, side, side, 3), np.uint8)
    return Sequence(name, (ChatMessage("user", "How?"),), pixels, SamplingParams(max_tokens=1))


@pytest.mark.parametrize("max_frame_pixels", [1, 28 * 28 * 32 * 32])
def test_batches_of_any_allowed_frames_keep_within_what_is_set_aside(
    max_frame_pixels: int, model: Qwen25VL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small frames, those that suit the model, and the largest, of several videos at a time."""
    config = EngineConfig(backend="cpu", vision_batch_frames=4, max_frame_pixels=max_frame_pixels)
    engine = RecordingEngine(model, config)
    set_aside = vision_bytes(model, config, engine.batching)
    counted: list[int] = []
    encode_frames = Qwen25VL.encode_frames

    def watched(self: Qwen25VL, frames: Tensor) -> Iterator[Tensor | None]:
        """At once, so that nothing but the tower is counted."""
        with LiveBytes() as live:
            results = list(encode_frames(self, frames))
        counted.append(live.peak + frames.nbytes)
        return iter(results)

    monkeypatch.setattr(Qwen25VL, "encode_frames", watched)
    sides = [56, model.image_size]
    if max_frame_pixels > model.image_size**2:
        sides.append(32 * 28)
    sequences = [asked(f"{side} {n}", side, 2 + n) for side in sides for n in range(2)]
    events = engine.run(*sequences)
    assert all(report_of(events[sequence.sequence_id]) for sequence in sequences)
    assert counted and max(counted) <= set_aside


def test_frames_for_which_no_memory_is_set_aside_are_refused(model: Qwen25VL) -> None:
    engine = RecordingEngine(model, EngineConfig(backend="cpu", max_frame_pixels=28 * 28 * 300))
    engine.add(asked("fits", 17 * 28, 1))
    with pytest.raises(InvalidRequestError, match="at most 235200 pixels"):
        engine.add(asked("too large", 18 * 28, 1))
    engine.drain()


def test_frames_that_suit_the_model_are_taken_whatever_the_setting(model: Qwen25VL) -> None:
    engine = RecordingEngine(model, EngineConfig(backend="cpu", max_frame_pixels=1))
    engine.add(asked("usual", model.image_size, 1))
    with pytest.raises(InvalidRequestError, match="pixels"):
        engine.add(asked("too large", model.image_size + 28, 1))
    engine.drain()


def test_larger_frames_take_more_from_the_start(model: Qwen25VL) -> None:
    batching = Batching(max_running_sequences=1, prefill_chunk_tokens=1, vision_batch_frames=2)
    usual = vision_bytes(model, EngineConfig(), batching)
    largest = vision_bytes(model, EngineConfig(max_frame_pixels=2 * 1024 * 768), batching)
    assert largest == pytest.approx(2 * usual, rel=1e-3)
