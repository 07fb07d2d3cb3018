"""Training: resumable to the same losses, on scenes and dropped tokens that chance alone picks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.tiny.architecture import new_model
from dycoke_core.tiny.questions import GUESS, questions_about
from dycoke_core.tiny.render import render
from dycoke_core.tiny.scenes import HELD_OUT, sample_scene
from dycoke_core.tiny.training import language_stage, run, vision_stage
from dycoke_core.tiny.training.batches import (
    ASKED,
    IGNORED,
    BatchKey,
    encode_question,
    frame_batch,
    prefix_ids,
    video_batch,
)
from dycoke_core.tiny.training.language_stage import StepPlan, choose_tokens, plan_step
from dycoke_core.tiny.training.muon import orthogonal
from dycoke_core.tiny.training.packed import run_packed
from dycoke_core.tiny.training.projection import visual_tokens
from dycoke_core.tiny.training.run import OtherPlanError, TrainingPlan, run_stages, train
from dycoke_core.tiny.training.schedule import DECAY, learning_rate_factor, steps_to_finish
from dycoke_core.tiny.training.targets import MOTIONS, NOTHING, history_labels


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    meeting_point = f"file://{tmp_path / 'processes'}"
    dist.init_process_group("gloo", init_method=meeting_point, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_stage, "FRAMES_PER_STEP", 4)
    monkeypatch.setattr(run, "_LOG_EVERY", 1)
    monkeypatch.setattr(
        language_stage, "plan_step", lambda *_, **__: StepPlan(num_frames=8, num_videos=1)
    )


class Interrupted(Exception):
    pass


@pytest.mark.filterwarnings("ignore:.*barrier.*")
@pytest.mark.parametrize("stage", ["vision", "language"])
def test_a_resumed_run_has_the_losses_of_an_undisturbed_one(
    stage: str, tmp_path: Path, alone: None, small_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(name: str) -> TrainingPlan:
        (tmp_path / name).mkdir(exist_ok=True)
        return TrainingPlan(tmp_path / name, vision_steps=4, language_steps=4, processes=1)

    run_stages(plan("undisturbed"), rank=0)

    monkeypatch.setattr(run, "_SAVE_EVERY_S", 0.0)
    trained = {"vision": vision_stage.VisionStage, "language": language_stage.LanguageStage}[stage]
    losses = trained.losses

    def interrupted(self: Any, step: int, num_steps: int) -> Any:
        if step == 2:
            raise Interrupted
        return losses(self, step, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr(trained, "losses", interrupted)
        with pytest.raises(Interrupted):
            run_stages(plan("interrupted"), rank=0)
    run_stages(plan("interrupted"), rank=0)

    def outcome(name: str) -> tuple[list[Any], dict[str, torch.Tensor]]:
        log = torch.load(tmp_path / name / "state.pt", weights_only=True)["log"]
        losses = [(entry["stage"], entry["step"], entry["train"]["loss"]) for entry in log]
        return losses, load_file(tmp_path / name / "checkpoint" / "model.safetensors")

    (expected, weights), (actual, resumed) = outcome("undisturbed"), outcome("interrupted")
    assert actual == expected
    assert len(expected) == 8
    for name, tensor in weights.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_finish_file_shortens_the_run(tmp_path: Path, alone: None, small_steps: None) -> None:
    (tmp_path / "finish").touch()
    run_stages(TrainingPlan(tmp_path, vision_steps=500, language_steps=500, processes=1), rank=0)
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()


def test_the_learning_rate_warms_up_falls_slowly_and_then_to_zero() -> None:
    factors = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] < 0.1 and factors[-1] < 0.002
    assert factors[40:150] == [1.0] * 110
    assert factors[150:] == sorted(factors[150:], reverse=True)
    assert factors[599] == pytest.approx(0.5), "half of it at four times the steps"
    before = learning_rate_factor(299, 1000)
    assert learning_rate_factor(299, steps_to_finish(299)) == pytest.approx(before, abs=0.01)
    assert steps_to_finish(300) == pytest.approx(300 / (1 - DECAY), abs=1)


def test_one_pass_over_many_questions_equals_a_pass_for_each() -> None:
    language_model = new_model(0).model.language_model
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randn(2, 30, 256, generator=generator)
    blocks = [torch.randn(2, n, s, 256, generator=generator) for n, s in ((3, 5), (1, 9))]
    with torch.no_grad():
        packed, _ = run_packed(language_model, prefix, blocks, tap_layer=3)
        for block, result in zip(blocks, packed, strict=True):
            for place in range(block.shape[1]):
                whole = torch.cat([prefix, block[:, place]], dim=1)
                alone = language_model(inputs_embeds=whole, use_cache=False).last_hidden_state
                torch.testing.assert_close(result[:, place], alone[:, 30:], atol=1e-5, rtol=1e-4)


def test_training_sees_the_tokens_that_the_engine_sees(tiny_model: LlavaOnevision) -> None:
    frames = torch.from_numpy(render(sample_scene(1, num_frames=8)))
    *_, expected = tiny_model.encode_frames(frames)
    torch.testing.assert_close(visual_tokens(tiny_model.model, frames), expected)


def test_training_asks_in_the_prompts_that_the_engine_asks_in(tiny_model: LlavaOnevision) -> None:
    from dycoke_core.sequence import ChatMessage

    question = questions_about(sample_scene(1))[0]
    prompt = tiny_model.prompt_encoder((ChatMessage("user", question.text),))
    asked, answer = encode_question(question)
    assert (prefix_ids(), asked) == (prompt.ids_before_video, prompt.ids_after_video)
    assert tiny_model.prompt_encoder.tokenizer.decode(answer) == question.answer + "<|im_end|>"


def test_a_run_is_not_gone_on_with_by_another_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[TrainingPlan] = []
    monkeypatch.setattr(run, "spawn", lambda work, arguments, nprocs: started.append(arguments[0]))
    plan = TrainingPlan(tmp_path)
    train(plan)
    train(plan)
    with pytest.raises(OtherPlanError, match="another plan"):
        train(TrainingPlan(tmp_path, drops_tokens=True))
    assert started == [plan, plan]


def test_a_batch_depends_on_its_key_alone() -> None:
    first, again, other = (
        video_batch(BatchKey(0, step), num_videos=2, num_frames=8) for step in (3, 3, 4)
    )
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)
    for block, same in zip(first.blocks, again.blocks, strict=True):
        assert torch.equal(block.ids, same.ids)
        is_answer = block.targets != IGNORED
        assert (is_answer.sum(dim=-1) >= 3).all()


def test_a_guess_takes_the_place_of_one_short_question() -> None:
    plain, guessing = (
        video_batch(BatchKey(0, 0), num_videos=4, num_frames=8, has_guesses=has_guesses)
        for has_guesses in (False, True)
    )
    for before, after in zip(plain.blocks, guessing.blocks, strict=True):
        is_guess = after.families == ASKED.index(GUESS)
        assert torch.equal(before.ids[~is_guess], after.ids[~is_guess])
    assert [int((b.families == ASKED.index(GUESS)).sum()) for b in guessing.blocks] == [4, 0]
    assert not any((block.families == ASKED.index(GUESS)).any() for block in plain.blocks)


def test_no_frame_of_the_first_stage_shows_a_held_out_pair() -> None:
    from tests.tiny.seen import look_at

    for step in range(4):
        batch = frame_batch(BatchKey(0, step), num_frames=24)
        named = [s for s in look_at(batch.frames.numpy())[0] if s.color != "white"]
        plain = {(s.color, s.shape) for s in named if s.frame % 2 == 0}
        assert not plain & HELD_OUT


def test_dropping_is_left_to_chance() -> None:
    rng = np.random.default_rng(0)
    kept = torch.stack(
        [torch.bincount(choose_tokens(rng, 8, 49, 0.7), minlength=392) for _ in range(400)]
    )
    assert (kept.sum(dim=1) == round(0.3 * 392)).all()
    assert kept.max() == 1
    often = kept.float().mean(dim=0)
    assert (abs(often - 0.3) < 0.12).all(), "no token is preferred"
    per_frame = kept.view(400, 8, 49).float().mean(dim=2)
    assert per_frame.std() > 0.08, "frames lose different shares"


def test_the_curriculum_begins_with_short_videos_and_milder_dropping() -> None:
    plans = [plan_step(0, step, 1000, drops_tokens=True) for step in range(1000)]
    early, late = plans[:350], plans[350:]
    assert all(plan.num_frames == 8 and plan.dropped <= 0.7 for plan in early)
    assert {plan.num_frames for plan in late} == {8, 16, 32}
    assert [plan.counts_evenly for plan in plans] == [True] * 250 + [False] * 750
    assert 0.8 < max(plan.dropped for plan in late) <= 0.9
    assert [plan.has_guesses for plan in plans] == [False] * 720 + [True] * 280
    assert 0.5 < np.mean([plan.dropped > 0 for plan in plans[:720]]) < 0.6
    assert 0.65 < np.mean([plan.dropped > 0 for plan in plans[720:]]) < 0.75
    whole = [plan_step(0, step, 1000) for step in range(1000)]
    assert all(plan.dropped == 0 for plan in whole)
    assert [plan.num_frames for plan in whole] == [plan.num_frames for plan in plans]


def test_an_answer_counts_by_its_familys_weight() -> None:
    stage = language_stage.LanguageStage(new_model(0), 0, 0, 1)
    batch = video_batch(BatchKey(0, 0), num_videos=2, num_frames=8)
    generator = torch.Generator().manual_seed(2)
    hidden = [torch.randn(*block.ids.shape, 256, generator=generator) for block in batch.blocks]
    present = {ASKED[i] for block in batch.blocks for i in block.families.flatten().tolist()}

    def loss(weights: dict[str, float]) -> float:
        return float(stage.answer_loss(batch, hidden, weights)[0].detach())

    def number(family: str) -> int:
        place = ASKED.index(family)
        return sum(int((block.families == place).sum()) for block in batch.blocks)

    nothing = dict.fromkeys(ASKED, 0.0)
    alone = {family: loss(nothing | {family: 1.0}) for family in present}
    weights = nothing | {family: 1.0 + i for i, family in enumerate(sorted(present))}
    shares = {family: weights[family] * number(family) for family in present}
    expected = sum(shares[f] * alone[f] for f in present) / sum(shares.values())
    assert loss(weights) == pytest.approx(expected, rel=1e-5)
    assert max(alone.values()) > 2 * min(alone.values()), "families differ, so weights show"


def test_history_tells_what_has_happened_so_far_and_no_more() -> None:
    scene = sample_scene(5, event="blink")
    labels = history_labels(scene)
    (thing,) = [thing for thing in scene.things if thing.blinks]
    place = scene.things.index(thing)
    assert (labels.background[0] == labels.background[-1]).all()
    for frame in range(scene.num_frames):
        cells = labels.blinks[frame][labels.color[frame] >= 0]
        begun = sum(blink.start <= frame for blink in thing.blinks)
        assert set(cells.tolist()) <= {0, begun}
    seen_early = labels.motion[: scene.num_frames // 4]
    assert (seen_early == NOTHING).all()
    assert labels.motion.max() < len(MOTIONS)
    assert place < len(scene.things)


def test_muon_makes_an_update_orthogonal() -> None:
    matrices = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5 and values.max() < 1.4
