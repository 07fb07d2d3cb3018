"""Loading Qwen's models: the hub's layouts, other dtypes, and what their towers cost."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from dycoke_core.compression.flops import vision_flops
from dycoke_core.config import EngineConfig
from dycoke_core.errors import InvalidRequestError, ModelLoadError
from dycoke_core.model.loader import load_model
from dycoke_core.model.qwen_vl import QwenVL
from dycoke_core.sequence import ChatMessage, FrameTiming, SamplingParams, Sequence
from tests.engine.recording import RecordingEngine, moving_square
from tests.random_qwen import build_random_qwen2_5_vl, build_random_qwen3_vl


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random") / "qwen2_5_vl"
    build_random_qwen2_5_vl(directory)
    return directory


def load(checkpoint: Path, dtype: str = "float32") -> QwenVL:
    model = load_model(checkpoint, device="cpu", dtype=dtype)
    assert isinstance(model, QwenVL)
    return model


def answer(model: QwenVL) -> list[int]:
    multiple = model.patches.limits.multiple
    frames = moving_square(1, 4, 112)[:, : 2 * multiple, : 3 * multiple]
    sequence = Sequence("a", (ChatMessage("user", "What?"),), frames, SamplingParams(max_tokens=5))
    events = RecordingEngine(model, EngineConfig(backend="cpu")).run(sequence)["a"]
    assert events[-1].report is not None
    return sequence.output_token_ids


def to_flat_config(checkpoint: Path) -> None:
    """As the hub's repositories were first published: the text's settings on top, and `mrope`."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    config |= {name: value for name, value in text.items() if name != "model_type"}
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["vision_config"]["model_type"] = "qwen2_5_vl"
    file.write_text(json.dumps(config))


def test_a_flat_configuration_is_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    expected = answer(load(checkpoint))
    build_random_qwen2_5_vl(tmp_path / "flat")
    to_flat_config(tmp_path / "flat")
    assert answer(load(tmp_path / "flat")) == expected


def test_a_video_processors_own_settings_come_first(checkpoint: Path, tmp_path: Path) -> None:
    build_random_qwen2_5_vl(tmp_path / "own")
    size = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
    (tmp_path / "own" / "video_preprocessor_config.json").write_text(json.dumps({"size": size}))
    limits = load(tmp_path / "own").patches.limits
    assert (limits.min_pixels, limits.max_pixels) == (28 * 28, 16 * 28 * 28)
    assert load(tmp_path / "own").image_size == 4 * 28
    assert load(checkpoint).patches.limits.max_pixels == 12845056


@pytest.fixture(scope="module")
def checkpoint_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random") / "qwen3_vl"
    build_random_qwen3_vl(directory)
    return directory


@pytest.fixture(params=["checkpoint", "checkpoint_3"])
def either(request: pytest.FixtureRequest) -> Path:
    path = request.getfixturevalue(request.param)
    assert isinstance(path, Path)
    return path


def test_a_bfloat16_model_answers(either: Path) -> None:
    assert len(answer(load(either, "bfloat16"))) == 5


def test_a_mixture_of_experts_is_refused_by_name(checkpoint_3: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint_3 / "config.json").read_text())
    config |= {
        "model_type": "qwen3_vl_moe",
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = r"'qwen3_vl_moe' .*Qwen3VLMoeForConditionalGeneration.*qwen3_vl"
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path)


def test_a_videos_budget_is_of_all_its_frames(checkpoint_3: Path) -> None:
    model = load(checkpoint_3)
    model.clip((64, 448, 448, 3), None)
    with pytest.raises(InvalidRequestError, match="25165824 pixels together"):
        model.clip((128, 448, 448, 3), None)


@pytest.mark.parametrize("tokens", [(3, 2), (4, 5)])
def test_vision_flops_are_those_counted_by_torch(tokens: tuple[int, int], either: Path) -> None:
    checkpoint = either
    eager = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    model = load(checkpoint)
    patches = model.patches
    size = tokens[0] * patches.limits.multiple, tokens[1] * patches.limits.multiple
    rows, columns = patches.grid(*size)
    pixels = torch.zeros(3 * rows * columns, 3 * 2 * patches.patch**2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager.model.get_video_features(pixels, torch.tensor([[3, rows, columns]]))
    expected = vision_flops(model.vision_geometry(*size), num_units=3)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_seconds_between_frames_come_from_the_duration_or_the_times() -> None:
    assert FrameTiming((0.0, 1.0, 2.0), duration_s=6.0).seconds_per_frame == 2.0
    assert FrameTiming((1.0, 2.0, 4.0)).seconds_per_frame == 1.5
    assert FrameTiming((1.0,)).seconds_per_frame == 0.0


@pytest.mark.parametrize(
    ("times", "duration_s"),
    [((1.0, 0.5), None), ((-1.0,), None), ((float("nan"),), None), ((0.0,), 0.0)],
)
def test_times_that_cannot_be_are_refused(
    times: tuple[float, ...], duration_s: float | None
) -> None:
    with pytest.raises(InvalidRequestError):
        FrameTiming(times, duration_s)
