"""From a file to a prompt: which frames a rate takes of it, when they are shown, and the ids and
positions that follow are those that the processors make of the same file's metadata."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from app.api.post.frames_by_rate import count_by_rate
from app.messages import FrameRate
from dycoke_core.config import CompressionConfig
from dycoke_core.model.adapter import Text, VideoLanguageModel
from dycoke_core.model.loader import load_model
from dycoke_core.sequence import ChatMessage, FrameTiming, SamplingParams, Sequence
from dycoke_core.video import FrameReaders, FrameSpec, ReadLimits, VideoFrames, VideoProbe
from tests.cards import model_card
from tests.engine import qwen_reference
from tests.engine.qwen_reference import Qwen3Reference, QwenReference
from tests.qwen_sampling import SampleFrames, sample_qwen2_vl, sample_qwen3_vl
from tests.random_qwen import build_random_qwen2_5_vl, build_random_qwen3_vl
from tests.video_clips import make_clip

FAMILIES: dict[str, tuple[Callable[..., None], Callable[[Path], QwenReference], SampleFrames]] = {
    "qwen2_5_vl": (build_random_qwen2_5_vl, QwenReference, sample_qwen2_vl),
    "qwen3_vl": (build_random_qwen3_vl, Qwen3Reference, sample_qwen3_vl),
}


def read_by_rate(
    path: Path, model: VideoLanguageModel, fps: float
) -> tuple[VideoProbe, VideoFrames]:
    """As the service does it, with the readers' own processes."""
    assert model.frame_rate is not None
    rule = model.frame_rate
    rate = FrameRate(min_frames=rule.min_frames, max_frames=rule.max_frames, multiple=rule.multiple)

    async def read() -> tuple[VideoProbe, VideoFrames]:
        readers = FrameReaders(ReadLimits(), max_readers=1)
        try:
            probe = await readers.probe(path)
            num_frames, warnings = count_by_rate(
                fps,
                probe,
                model_card(frame_rate=rate),
                clip=(None, None),
                num_frames=None,
                most=128,
            )
            assert warnings == []
            size = model.frame_limits
            assert size is not None
            limits = size.within(96 * 96, num_frames=num_frames)
            spec = FrameSpec(num_frames, limits, spread=model.frame_spread)
            return probe, await readers.read(path, spec)
        finally:
            await readers.aclose()

    return asyncio.run(read())


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_files_frames_times_ids_and_positions_are_the_processors(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, reference_of, sample = FAMILIES[family]
    build(tmp_path)
    model = load_model(tmp_path, device="cpu", dtype="float32")
    reference = reference_of(tmp_path)
    for name, total, video_fps, fps in (
        ("clip.mp4", 190, 25, 2.0),
        ("clip.mp4", 38, 25, 2.0),
        ("clip.mp4", 90, 12, 3.0),
        ("clip.mkv", 144, 24, 2.0),  # whose times are whole milliseconds
        ("clip.mkv", 180, 60, 2.0),
    ):
        path = make_clip(tmp_path / name, num_frames=total, fps=video_fps)
        probe, frames = read_by_rate(path, model, fps)
        assert probe.fps == video_fps
        assert probe.num_frames == (total if path.suffix == ".mp4" else None)
        indices = sample(total, fps=fps, video_fps=float(video_fps))
        assert list(frames.indices) == indices
        assert frames.shown_s == pytest.approx(total / video_fps)
        metadata = VideoMetadata(total, fps=float(video_fps), frames_indices=indices)
        asked = Sequence(
            "a",
            (ChatMessage("user", "What happens?"),),
            np.ascontiguousarray(frames.pixels),
            SamplingParams(max_tokens=1),
            CompressionConfig.parse("full"),
            timing=FrameTiming.shown_at(frames.timestamps_s, frames.shown_s),
        )
        assert_same_prompt(asked, metadata, model, reference, monkeypatch)


def assert_same_prompt(
    asked: Sequence,
    metadata: VideoMetadata,
    model: VideoLanguageModel,
    reference: QwenReference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(qwen_reference, "metadata", lambda _: metadata)
        seconds = qwen_reference.TEMPORAL / metadata.sampled_fps
        patches.setattr(qwen_reference, "seconds_per_unit", lambda _: seconds)
        inputs: dict[str, Any] = reference.inputs(asked)
    assert asked.frames is not None
    layout = model.lay_out(asked.messages, model.clip(asked.frames.shape, asked.timing))
    ids: list[int] = []
    for segment in layout.prefix:
        if isinstance(segment, Text):
            ids += segment.token_ids
        else:
            ids += [reference.video_token_id] * (len(segment.indices) * layout.tokens_per_unit)
    assert [*ids, *layout.question_ids] == inputs["input_ids"][0].tolist()
    num_visual = layout.num_units * layout.tokens_per_unit
    features = torch.zeros(layout.num_units, layout.tokens_per_unit, model.feature_size)
    per_unit = (layout.tokens_per_unit,) * layout.num_units
    embedded = model.embed(layout, features, torch.arange(num_visual), per_unit)
    expected = reference.positions(inputs)
    assert torch.equal(embedded.positions, expected[:, : embedded.positions.shape[1]])
    next_position = model.next_position(layout, num_visual)
    assert next_position == int(expected[0, embedded.positions.shape[1]])
