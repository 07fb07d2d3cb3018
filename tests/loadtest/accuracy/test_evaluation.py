"""The laboratory end to end, with the bundled model and scores that do not need a clever one."""

import hashlib
import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import loadtest
from dycoke_core.config import CompressionConfig, EngineConfig
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from dycoke_core.model_frames import Spread
from dycoke_core.sequence import SamplingParams, Sequence
from dycoke_core.tiny import CHECKPOINT
from dycoke_core.tiny.clip import FPS
from dycoke_core.tiny.questions import FAMILIES, Question
from loadtest.accuracy import __main__ as program
from loadtest.accuracy.clips import QuestionSet, load_questions, sample_frames
from loadtest.accuracy.evaluation import Laboratory, Outcome, open_engine
from loadtest.accuracy.pictures import watch
from loadtest.accuracy.processes import CLIPS_AT_ONCE, ModelSource, evaluate
from loadtest.accuracy.settings import Setting
from tests.engine.recording import RecordingEngine, make_sequence, moving_square, report_of


def arbitrary_score(question: Question, answer: str) -> float:
    """Distinguishes texts: every text has its own score in [0, 1)."""
    return int.from_bytes(hashlib.sha256(answer.encode()).digest()[:4], "big") / 2**32


def test_questions_are_as_many_of_every_family_and_one_of_each_per_video() -> None:
    questions = load_questions(7)
    assert np.bincount(questions.families).tolist() == [7] * len(FAMILIES)
    for clip in questions.clips:
        families = [asked.question.family for asked in clip.questions]
        assert len(set(families)) == len(families) > 0
        assert clip.scene.split == "test"
        for asked in clip.questions:
            assert FAMILIES[questions.families[asked.index]] == asked.question.family
            assert questions.videos[asked.index] == clip.index
    others = load_questions(7, first_seed=1000)
    seeds = [{clip.scene.seed for clip in some.clips} for some in (questions, others)]
    assert not seeds[0] & seeds[1]


def test_frames_come_at_the_size_that_a_model_takes() -> None:
    clip = load_questions(1).clips[0]
    small, large = clip.frames(224), clip.frames(384)
    assert (small.shape, large.shape) == ((32, 224, 224, 3), (32, 384, 384, 3))
    assert large.dtype == np.uint8
    assert abs(small.mean(axis=(1, 2)) - large.mean(axis=(1, 2))).max() < 1


PLACES: dict[Spread, list[int]] = {
    "floor": [0, 4, 8, 13, 17, 22, 26, 31],
    "nearest": [0, 4, 9, 13, 18, 22, 27, 31],
    "starts": [0, 4, 8, 12, 16, 20, 24, 28],
}


@pytest.mark.parametrize("spread", get_args(Spread))
def test_fewer_frames_are_those_that_readers_would_choose_for_the_model(spread: Spread) -> None:
    frames, clip = moving_square(1, 32), load_questions(1).clips[0]
    assert clip.scene.num_frames == 32
    assert sample_frames(frames, 32, spread) is frames
    assert np.array_equal(sample_frames(frames, 8, spread), frames[PLACES[spread]])
    times_s = clip.timing(8, spread).timestamps_s
    assert times_s == tuple(place / FPS for place in PLACES[spread])


def test_many_at_once_score_as_one_by_one(
    tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.accuracy.evaluation.score", arbitrary_score)
    settings = [
        Setting("full", num_frames=8),
        Setting("dycoke", compression=CompressionConfig(), num_frames=8),
        Setting("random", compression=CompressionConfig(policy="random_kv"), num_frames=8),
    ]
    questions = first_clip_of(load_questions(1))
    outcomes = Laboratory(open_engine(tiny_model), settings).examine(questions.clips)
    (clip,) = questions.clips
    for setting in settings:
        asked = clip.questions[-1]
        sequence = Sequence(
            sequence_id="a",
            messages=asked.messages,
            frames=sample_frames(clip.frames(224), setting.num_frames, "floor"),
            sampling=SamplingParams(max_tokens=asked.max_tokens),
            compression=setting.for_video(clip.scene.seed),
        )
        report = report_of(RecordingEngine(tiny_model, EngineConfig()).run(sequence)["a"])
        expected = arbitrary_score(asked.question, report.text)
        assert outcomes[setting.name].scores[asked.index] == expected
    assert outcomes["full"].num_decode_steps == 0
    assert 0 < outcomes["dycoke"].refresh_rate <= 1


def test_baselines_answer_every_question_of_a_video(
    tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.accuracy.evaluation.score", arbitrary_score)
    monkeypatch.setattr("loadtest.accuracy.clips.MAX_TOKENS", dict.fromkeys(FAMILIES, 12))
    # Of a scene about which a model with random weights does not always say the same.
    questions = first_clip_of(load_questions(1, first_seed=0))
    settings = [Setting("full"), Setting("F", "fastv", layer=3), Setting("P", "prumerge")]
    outcomes = Laboratory(open_engine(tiny_model), settings).examine(questions.clips)
    full, fastv, prumerge = (outcomes[setting.name].in_order() for setting in settings)
    assert len(full) == len(questions.clips[0].questions) > 2
    assert (full != fastv).any() and (full != prumerge).any(), "they do something"


def first_clip_of(questions: QuestionSet) -> QuestionSet:
    num_questions = len(questions.clips[0].questions)
    return QuestionSet(
        questions.clips[:1], questions.families[:num_questions], questions.videos[:num_questions]
    )


def test_processes_share_the_videos_and_find_what_one_finds(random_checkpoint: Path) -> None:
    settings = [Setting("few", compression=CompressionConfig(policy="random_ttm"), num_frames=2)]
    questions = load_questions(1)
    assert len(questions.clips) > CLIPS_AT_ONCE
    source = ModelSource(str(random_checkpoint), "cpu", "float32")
    seen: list[int] = []
    apart = evaluate(source, questions, settings, num_processes=2, on_clips=seen.append)
    here = evaluate(source, questions, settings, engine=open_engine(source.load()))
    assert apart == here
    assert sum(seen) == len(questions.clips)
    assert len(here["few"].in_order()) == len(questions.families)


def arbitrary_outcomes(
    source: ModelSource, questions: QuestionSet, settings: list[Setting], **_: object
) -> dict[str, Outcome]:
    """Right and wrong answers drawn at random; later settings get more right."""
    rng = np.random.default_rng(0)
    outcomes = {}
    for place, setting in enumerate(settings):
        rights = rng.random(len(questions.families)) < 0.2 + 0.7 * place / len(settings)
        outcomes[setting.name] = Outcome(dict(enumerate(rights.astype(float).tolist())))
    return outcomes


def test_the_program_writes_tables_pictures_and_numbers(
    random_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(program, "evaluate", arbitrary_outcomes)
    monkeypatch.setattr("loadtest.accuracy.pictures.MAX_TOKENS", 6)
    arguments = ["--n", "20", "--quiet", "--output", str(tmp_path), "--device", "cpu"]
    arguments += ["--model", str(random_checkpoint)]
    monkeypatch.setattr(sys, "argv", ["accuracy", *arguments])
    assert program.main() == 0
    report = json.loads((tmp_path / "accuracy.json").read_text())
    assert set(report["test_set"]["questions"].values()) == {20}
    assert report["environment"]["packages"]["torch"] and report["model"]["weights_digest"]
    full, fastv = report["settings"]["full"], report["settings"]["FastV (35 %)"]
    assert full["versus_full"]["short"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert fastv["short"]["value"] == pytest.approx(np.mean([*fastv["families"].values()][:-1]))
    gain = fastv["short"]["value"] - full["short"]["value"]
    assert fastv["versus_full"]["short"]["value"] == pytest.approx(gain)
    assert {claim["verdict"] for claim in report["claims"]} >= {"holds", "fails"}
    text = (tmp_path / "accuracy.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    for name in report["tables"]["table1"] + report["tables"]["table6"]:
        assert f"| {name} |" in text
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"attention.png", "families.png", "figure5.png", "kept.png"}


def test_the_published_tables_are_those_of_the_bundled_model() -> None:
    results = Path(loadtest.__file__).parent / "results" / "accuracy"
    report = json.loads((results / "accuracy.json").read_text())
    bundled = load_model(CHECKPOINT, device="cpu", dtype="float32")
    assert report["model"]["weights_digest"] == bundled.weights_digest
    assert min(report["test_set"]["questions"].values()) >= 200


def test_policies_can_be_named_as_requests_name_them(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "evaluate", arbitrary_outcomes)
    monkeypatch.setattr("loadtest.accuracy.pictures.MAX_TOKENS", 2)
    policies = ["lowest_kv", '{"policy": "vidcom2", "retained_ratio": 0.5}']
    arguments = ["--policies", *policies, "--n", "5", "--quiet", "--output", str(tmp_path)]
    arguments += ["--model", str(random_checkpoint), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["accuracy", *arguments])
    assert program.main() == 0
    report = json.loads((tmp_path / "accuracy.json").read_text())
    methods = [row["compression"]["policy"] for row in report["settings"].values()]
    assert methods == ["full", "lowest_kv", "vidcom2"]
    assert "| vidcom2 (retained_ratio=0.5) | 784 / 784 |" in (tmp_path / "accuracy.md").read_text()


def test_the_gaze_of_the_scoring_layer_is_what_stage_two_selects_by(
    engine: RecordingEngine,
) -> None:
    """The picture of kept tokens shows the engine's own first selection."""
    sequence = make_sequence(video=4, num_frames=8)
    engine.run(sequence)
    gaze = watch(engine.model, sequence.frames, sequence.messages[0].content, k=0.7)
    scores = gaze.by_layer[2][0]
    kept = scores.sort(descending=True, stable=True).indices[:54].sort().values
    assert engine.recordings["a"].kept[0].tolist() == kept.tolist()
