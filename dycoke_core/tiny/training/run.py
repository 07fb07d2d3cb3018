"""Runs both stages of training in several processes; resumable.

Each process computes with one thread on its own share of every step's scenes and averages its
gradients with the others'. On a shared machine that is several times faster than one process with
several threads, which wait for each other in every operation. The result depends on the seed, the
numbers of steps and the number of processes.

A run has a directory: `plan.json`, `state.pt` (written every few minutes, a restart resumes from
it), `log.json`, the curves, and at the end `checkpoint/`. A file named `finish` in it starts the
final decay of the learning rate at once.
"""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_core.tiny.architecture import new_model, save_checkpoint
from dycoke_core.tiny.tokenizer import build_tokenizer
from dycoke_core.tiny.training.alignment import align
from dycoke_core.tiny.training.curves import draw_curves
from dycoke_core.tiny.training.language_stage import LanguageStage
from dycoke_core.tiny.training.schedule import learning_rate_factor, steps_to_finish
from dycoke_core.tiny.training.vision_stage import VisionStage

LOG_EVERY = 25  # steps
SAVE_EVERY_S = 150.0

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    directory: Path
    seed: int = 0
    vision_steps: int = 600
    language_steps: int = 2700
    processes: int = 2
    drops_tokens: bool = False  # in many of the language stage's steps

    def recipe(self) -> dict[str, int]:
        """What a resumed run must have in common with the one before."""
        return {name: int(value) for name, value in asdict(self).items() if name != "directory"}


class OtherPlanError(Exception):
    """Resuming would mix two runs, or pass off one as the other."""


class Stage(Protocol):
    """What the loop trains. `step` of `num_steps` decides what a step trains on."""

    name: str
    heads: nn.ModuleDict
    optimizers: list[torch.optim.Optimizer]

    def losses(self, step: int, num_steps: int) -> tuple[Tensor, Figures]: ...

    def test(self, step: int) -> Figures:
        """Figures on held-out scenes; empty if this step needs none."""
        ...

    def finish(self) -> None: ...


def train(plan: TrainingPlan) -> None:
    """Trains, or resumes where an earlier call stopped, and writes the checkpoint.

    Raises:
        OtherPlanError: the directory holds a run of another plan.
    """
    plan.directory.mkdir(parents=True, exist_ok=True)
    _check_recipe(plan)
    meeting_point = plan.directory / "processes"
    meeting_point.unlink(missing_ok=True)
    spawn(_work, (plan, meeting_point), nprocs=plan.processes)  # type: ignore[no-untyped-call]


def _check_recipe(plan: TrainingPlan) -> None:
    file = plan.directory / "plan.json"
    if file.is_file() and (recipe := json.loads(file.read_text())) != plan.recipe():
        raise OtherPlanError(f"{plan.directory} holds a run of another plan: {recipe}")
    file.write_text(json.dumps(plan.recipe()) + "\n")


def _work(rank: int, plan: TrainingPlan, meeting_point: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=plan.processes
    )
    try:
        run_stages(plan, rank)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_stages(plan: TrainingPlan, rank: int) -> None:
    """Runs one process's part; the process group must exist."""
    torch.manual_seed(plan.seed)  # for the heads; everything else has its own seeds
    model = new_model(plan.seed)
    align(model, build_tokenizer(), plan.seed)
    run = _Run(plan, rank, model)
    share = (plan.seed, rank, plan.processes)
    run.train(VisionStage(model, *share), plan.vision_steps)
    run.train(LanguageStage(model, *share, drops_tokens=plan.drops_tokens), plan.language_steps)
    if rank == 0:
        run.write_log()
        save_checkpoint(model, plan.directory / "checkpoint")


@dataclass(slots=True)
class _Run:
    """The loop, its log and its saved state. One per process; only the first writes."""

    plan: TrainingPlan
    rank: int
    model: LlavaOnevisionForConditionalGeneration
    log: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] | None = None  # what an earlier call left
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if (file := self.plan.directory / "state.pt").is_file():
            self.state = torch.load(file, weights_only=True)
            self.model.load_state_dict(self.state["model"])
            self.log = self.state["log"]

    def train(self, stage: Stage, num_steps: int) -> None:
        step = 0
        if self.state is not None:
            if stage.name != self.state["stage"]:
                return  # an earlier call finished it
            if self.state["is_finished"]:
                self.state = None
                return
            step, num_steps = self._resume(stage, self.state)
        recent: list[Figures] = []
        while step < num_steps:
            num_steps = self._agree_on(self._end(step, num_steps))
            recent.append(_take_step(stage, step, num_steps))
            step += 1
            if self.rank == 0 and (step % LOG_EVERY == 0 or step == num_steps):
                self._note(stage.name, step, num_steps, _mean(recent), stage.test(step))
                recent = []
            if self.rank == 0 and time.monotonic() - self.saved_at > SAVE_EVERY_S:
                self._save(stage, step, num_steps)
        stage.finish()
        if self.rank == 0:
            self._save(stage, step, num_steps, is_finished=True)

    def write_log(self) -> None:
        (self.plan.directory / "log.json").write_text(json.dumps(self.log, indent=1) + "\n")
        draw_curves(self.log, self.plan.directory)

    def _end(self, step: int, num_steps: int) -> int:
        """The last step, sooner if somebody asked to finish."""
        if (self.plan.directory / "finish").is_file():
            return min(num_steps, steps_to_finish(step))
        return num_steps

    def _agree_on(self, num_steps: int) -> int:
        agreed = torch.tensor([num_steps])
        dist.broadcast(agreed, 0)
        return int(agreed)

    def _note(self, stage: str, step: int, num_steps: int, figures: Figures, test: Figures) -> None:
        seconds = round(time.process_time())
        entry = {"stage": stage, "step": step, "of": num_steps, "cpu_s": seconds, "train": figures}
        self.log.append(entry | ({"test": test} if test else {}))
        shown = "  ".join(f"{name} {value:.3f}" for name, value in (test or figures).items())
        print(
            f"{stage} {step}/{num_steps} {seconds} s{'  TEST' if test else ''}  {shown}", flush=True
        )

    def _save(self, stage: Stage, step: int, num_steps: int, *, is_finished: bool = False) -> None:
        state = {
            "is_finished": is_finished,
            "stage": stage.name,
            "step": step,
            "num_steps": num_steps,
            "model": self.model.state_dict(),
            "heads": stage.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in stage.optimizers],
            "log": self.log,
        }
        part = self.plan.directory / "state.pt.part"
        torch.save(state, part)
        part.rename(self.plan.directory / "state.pt")
        self.write_log()
        self.saved_at = time.monotonic()

    def _resume(self, stage: Stage, state: dict[str, Any]) -> tuple[int, int]:
        stage.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(stage.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.state = None
        return state["step"], state["num_steps"]


def _take_step(stage: Stage, step: int, num_steps: int) -> Figures:
    factor = learning_rate_factor(step, num_steps)
    for optimizer in stage.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.zero_grad()
    loss, figures = stage.losses(step, num_steps)
    loss.backward()  # type: ignore[no-untyped-call]
    _average_gradients(stage.optimizers)
    for optimizer in stage.optimizers:
        optimizer.step()
    return figures


def _average_gradients(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Averages in one message; a parameter that a process did not use counts as 0 there."""
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
    dist.all_reduce(flat)
    pieces = torch.split(flat, [parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)


def _mean(figures: Sequence[Figures]) -> Figures:
    """The mean of each name over the steps in which it occurs."""
    found: dict[str, list[float]] = defaultdict(list)
    for one in figures:
        for name, value in one.items():
            found[name].append(value)
    return {name: round(sum(values) / len(values), 4) for name, values in found.items()}
