"""The laboratory with models of other families, on small random checkpoints."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dycoke_core.config import CompressionConfig, EngineConfig
from dycoke_core.engine import Engine
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.model.loader import load_model
from dycoke_core.sequence import SamplingParams, Sequence
from dycoke_core.tiny.questions import FAMILIES as QUESTION_FAMILIES
from loadtest.accuracy import __main__ as program
from loadtest.accuracy.clips import load_questions, sample_frames
from loadtest.accuracy.settings import Setting, Sizes, cost_of
from tests.engine.recording import RecordingEngine, report_of
from tests.loadtest.accuracy.test_evaluation import arbitrary_outcomes
from tests.random_gemma import build_random_gemma3
from tests.random_qwen import build_random_qwen2_5_vl, build_random_qwen3_vl, limit_pixels


def build_small_qwen2_5_vl(directory: Path) -> None:
    build_random_qwen2_5_vl(directory)
    limit_pixels(directory, 112 * 112)


def build_small_qwen3_vl(directory: Path) -> None:
    build_random_qwen3_vl(directory)
    limit_pixels(directory, 32 * 128 * 128)


FAMILIES: Mapping[str, Callable[[Path], None]] = {
    "gemma3": build_random_gemma3,
    "qwen2_5_vl": build_small_qwen2_5_vl,
    "qwen3_vl": build_small_qwen3_vl,
}
ARCHITECTURES = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random") / family
    FAMILIES[family](directory)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> VideoLanguageModel:
    torch.set_num_threads(1)
    return load_model(checkpoint, device="cpu", dtype="float32")


def run_program(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, *arguments: str) -> int:
    monkeypatch.setattr("loadtest.accuracy.pictures.MAX_TOKENS", 3)
    usual = ["--quiet", "--device", "cpu", "--processes", "1", "--model", str(checkpoint)]
    monkeypatch.setattr(sys, "argv", ["accuracy", *usual, *arguments])
    return program.main()


@pytest.mark.parametrize("num_frames", [32, 15])
@pytest.mark.parametrize(
    "compression",
    ["full", "dycoke", {"policy": "dycoke", "l": 1, "k": 0.5}, {"policy": "dycoke", "l": 5}],
    ids=str,
)
def test_costs_are_what_the_engines_receipts_say(
    compression: str | dict[str, object], num_frames: int, model: VideoLanguageModel
) -> None:
    setting = Setting(
        "any", compression=CompressionConfig.parse(compression), num_frames=num_frames
    )
    cost = cost_of(setting, Sizes.of(model))
    (clip, *_) = load_questions(1).clips
    sequence = Sequence(
        "a",
        clip.questions[0].messages,
        sample_frames(clip.frames(model.image_size), num_frames, model.frame_spread),
        SamplingParams(max_tokens=3),
        setting.compression,
        timing=clip.timing(num_frames, model.frame_spread),
    )
    report = report_of(RecordingEngine(model, EngineConfig()).run(sequence)["a"]).compression
    assert (
        cost.visual_tokens_in,
        cost.visual_tokens_prefill,
        cost.visual_tokens_decode,
    ) == (report.visual_tokens_in, report.visual_tokens_prefill, report.visual_tokens_decode)
    assert cost.visual_tokens_decode_mean / cost.visual_tokens_in == pytest.approx(
        report.retained_ratio_decode_all_layers
    )


def test_any_family_is_asked_the_whole_test_set(
    family: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By one engine, whose answer is drawn, too: on a GPU there is no memory for a second one."""
    opened: list[Engine] = []
    initialize = Engine.__init__

    def note(engine: Engine, *args: Any, **kwargs: Any) -> None:
        opened.append(engine)
        initialize(engine, *args, **kwargs)

    monkeypatch.setattr(Engine, "__init__", note)
    monkeypatch.setattr("loadtest.accuracy.clips.MAX_TOKENS", dict.fromkeys(QUESTION_FAMILIES, 3))
    arguments = ["--policies", "dycoke", "vidcom2", "--n", "1", "--output", str(tmp_path)]
    assert run_program(monkeypatch, checkpoint, *arguments) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "accuracy.json").read_text())
    assert report["model"]["architecture"] == ARCHITECTURES[family]
    policies = [row["compression"]["policy"] for row in report["settings"].values()]
    assert policies == ["full", "dycoke", "vidcom2"]
    assert set(report["test_set"]["questions"].values()) == {1}
    assert [path.name for path in tmp_path.glob("*.png")] == ["kept.png"]
    assert len(opened) == 1
    assert ARCHITECTURES[family] in (tmp_path / "accuracy.md").read_text()


def test_what_reaches_inside_another_family_is_left_out_and_said(
    family: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(program, "evaluate", arbitrary_outcomes)
    arguments = ["--tables", "table1", "--n", "5", "--output", str(tmp_path)]
    assert run_program(monkeypatch, checkpoint, *arguments) == 0
    named = f"left out for {ARCHITECTURES[family]}: FastV (35 %), PruMerge (55 %)"
    assert named in capsys.readouterr().err
    report = json.loads((tmp_path / "accuracy.json").read_text())
    assert report["left_out"] == ["FastV (35 %)", "PruMerge (55 %)"]
    assert {row["method"] for row in report["settings"].values()} == {"policy"}
    assert not any("FastV" in claim["text"] for claim in report["claims"])
    assert (
        "LLaVA-OneVision: FastV (35 %), PruMerge (55 %)." in (tmp_path / "accuracy.md").read_text()
    )
