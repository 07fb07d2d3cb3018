"""Training: resumable to the same losses, and by the plan that began it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dycoke_core.tiny.training import language_stage, run, vision_stage
from dycoke_core.tiny.training.language_stage import StepPlan
from dycoke_core.tiny.training.run import OtherPlanError, TrainingPlan, run_stages, train


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
    monkeypatch.setattr(run, "LOG_EVERY", 1)
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

    monkeypatch.setattr(run, "SAVE_EVERY_S", 0.0)
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
