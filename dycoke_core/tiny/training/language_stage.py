"""Stage 2: the language model learns to answer while the vision tower is frozen.

Each video has a dozen questions and a description after one shared prefix. Linear heads on the
visual tokens half-way up say what has happened to their thing so far (motion, blinks, order); they
teach the lower layers to look back in time, and are dropped afterwards.

The curriculum starts with 8 frames and even weights. Then rare questions count more (in a run where
they did from the start, the model never learnt to find things by their shape), then videos have 8
to 32 frames, and finally each has a question that it does not answer, so that the words of a
question rule no answer out: no yellow circle is ever seen in training.

All visual tokens are present. For comparison a run may lack a random share of them in most steps.
Neither stage I nor stage II of DyCoke is ever used in training.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_core.tiny.architecture import HIDDEN_SIZE
from dycoke_core.tiny.scenes import BACKGROUNDS, COLORS
from dycoke_core.tiny.training.batches import (
    ASKED,
    IGNORED,
    BatchKey,
    VideoBatch,
    prefix_ids,
    video_batch,
)
from dycoke_core.tiny.training.muon import Muon
from dycoke_core.tiny.training.packed import run_packed
from dycoke_core.tiny.training.projection import visual_tokens
from dycoke_core.tiny.training.targets import MOTIONS, NOTHING

TAP_LAYER = 3
_HEADS = {
    "color": len(COLORS),
    "motion": len(MOTIONS),
    "blinks": 4,
    "rank": 3,
    "background": len(BACKGROUNDS),
}
_MEASURES = {"way": 2, "time": 1}
_HEADS_WEIGHT = 0.15
_PLAN_KEY, _DROP_KEY = 6, 7
_EARLY = 0.35  # share of the steps that see short videos only
_EVEN = 0.25  # share of the steps in which every answer counts the same
_LATE = 0.72  # share of the steps before the last part of the curriculum
_LACKING, _LACKING_LATE = 0.55, 0.7  # share of the steps that lack tokens

# An answer's weight after that: more if few scenes allow the question, or it is learnt late.
_EVEN_WEIGHTS = dict.fromkeys(ASKED, 1.0)
_LATE_WEIGHTS = (
    _EVEN_WEIGHTS
    | dict.fromkeys(("direction", "position"), 2.0)
    | dict.fromkeys(("first", "last", "stationary", "action_count", "brief_event"), 3.0)
)
_TEST_EVERY, _TEST_PARTS, _TEST_VIDEOS = 200, 6, 2  # steps, batches, videos in each


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step trains on."""

    num_frames: int
    num_videos: int  # of all processes
    dropped: float = 0.0  # share of the visual tokens
    counts_evenly: bool = True  # every answer
    has_guesses: bool = False


def plan_step(seed: int, step: int, num_steps: int, *, drops_tokens: bool = False) -> StepPlan:
    """The curriculum. All processes draw the same plan; each step has about as many tokens."""
    rng = np.random.default_rng([_PLAN_KEY, seed, step])
    is_early = step < _EARLY * num_steps
    num_frames = 8 if is_early else int(rng.choice((8, 16, 32), p=(0.3, 0.3, 0.4)))
    dropped = float(rng.uniform(0.3, 0.7 if is_early else 0.9))
    is_late = step >= _LATE * num_steps
    lacks_tokens = drops_tokens and rng.random() < (_LACKING_LATE if is_late else _LACKING)
    num_videos = {8: 8, 16: 8, 32: 6} if lacks_tokens else {8: 8, 16: 6, 32: 4}
    return StepPlan(
        num_frames,
        num_videos[num_frames],
        dropped=dropped if lacks_tokens else 0.0,
        counts_evenly=step < _EVEN * num_steps,
        has_guesses=is_late,
    )


def choose_tokens(
    rng: np.random.Generator, num_frames: int, tokens_per_frame: int, dropped: float
) -> Tensor:
    """Draws the visual tokens that stay, int64 ascending, with a random share for each frame.

    Frames lose different shares, and some stay whole, so that the model learns to rely on nothing;
    the share over all frames is `dropped`, to within a token.
    """
    number = round((1 - dropped) * num_frames * tokens_per_frame)
    liking = rng.exponential(size=(num_frames, 1)) + 0.2  # of a frame
    keys = rng.exponential(size=(num_frames, tokens_per_frame)) / liking
    return torch.from_numpy(np.sort(np.argsort(keys, axis=None)[: max(1, number)]))


class LanguageStage:
    """The language model, its heads and their optimizers; one process's share of the work."""

    name = "language"

    def __init__(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        seed: int,
        process: int,
        num_processes: int,
        *,
        drops_tokens: bool = False,
    ) -> None:
        self.model = model
        self._seed = seed
        self._process = process
        self._num_processes = num_processes
        self._drops_tokens = drops_tokens
        for module in (model.model.vision_tower, model.model.multi_modal_projector):
            module.requires_grad_(False)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(HIDDEN_SIZE, size) for name, size in (_HEADS | _MEASURES).items()}
        )
        text = model.model.language_model
        matrices = [p for p in text.layers.parameters() if p.ndim == 2]
        rest = [p for p in text.layers.parameters() if p.ndim != 2]
        rest += [text.norm.weight, text.embed_tokens.weight, model.lm_head.weight]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=4e-3, weight_decay=0.02),
            torch.optim.AdamW(
                [*rest, model.model.image_newline, *self.heads.parameters()],
                lr=2e-3,
                weight_decay=0.0,
                betas=(0.9, 0.98),
            ),
        ]

    def losses(self, step: int, num_steps: int) -> tuple[Tensor, dict[str, float]]:
        """The loss, and for each family the share of answers that are right word for word."""
        plan = plan_step(self._seed, step, num_steps, drops_tokens=self._drops_tokens)
        key = BatchKey(self._seed, step, self._process)
        batch = video_batch(
            key,
            num_videos=plan.num_videos // self._num_processes,
            num_frames=plan.num_frames,
            has_guesses=plan.has_guesses,
        )
        rng = np.random.default_rng([_DROP_KEY, self._seed, step, self._process])
        weights = _EVEN_WEIGHTS if plan.counts_evenly else _LATE_WEIGHTS
        return self._losses(batch, plan.dropped, weights, rng)

    @torch.no_grad()
    def test(self, step: int) -> dict[str, float]:
        """Tests with all tokens; each word of an answer is predicted from the right ones before."""
        if step % _TEST_EVERY:
            return {}
        found: dict[str, list[float]] = {}
        for part in range(_TEST_PARTS):
            key = BatchKey(self._seed, part, split="test")
            batch = video_batch(key, num_videos=_TEST_VIDEOS, num_frames=32)
            rng = np.random.default_rng(0)
            for name, value in self._losses(batch, 0.0, _EVEN_WEIGHTS, rng)[1].items():
                found.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def finish(self) -> None:
        """Nothing is left to do."""

    def _losses(
        self,
        batch: VideoBatch,
        dropped: float,
        weights: Mapping[str, float],
        rng: np.random.Generator,
    ) -> tuple[Tensor, dict[str, float]]:
        num_videos, num_frames = batch.frames.shape[:2]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            visual = visual_tokens(self.model, batch.frames.flatten(0, 1))
        visual = visual.float().reshape(num_videos, -1, HIDDEN_SIZE)
        kept = choose_tokens(rng, num_frames, visual.shape[1] // num_frames, dropped)
        visual = visual[:, kept]
        embed = self.model.get_input_embeddings()
        before = embed(torch.tensor(prefix_ids())).expand(num_videos, -1, -1)
        newline = self.model.model.image_newline.expand(num_videos, 1, -1)
        prefix = torch.cat([before, visual, newline], dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            hidden, tapped = run_packed(
                self.model.model.language_model,
                prefix,
                [embed(block.ids) for block in batch.blocks],
                tap_layer=TAP_LAYER,
            )
        loss, figures = self.answer_loss(batch, hidden, weights)
        tapped = tapped[:, before.shape[1] : -1].float()
        labels = {name: v.flatten(1, 2)[:, kept] for name, v in batch.history.items()}
        terms = self._head_losses(tapped, labels)
        figures |= {f"head_{name}": float(term.detach()) for name, term in terms.items()}
        return loss + _HEADS_WEIGHT * torch.stack(list(terms.values())).sum(), figures

    def _head_losses(self, tapped: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """The heads' losses; terms without a label are left out."""
        terms: dict[str, Tensor] = {}
        for name in _HEADS:
            said = self.heads[name](tapped)
            if (labels[name] != NOTHING).any():
                terms[name] = F.cross_entropy(said.mT, labels[name], ignore_index=NOTHING)
        for name in _MEASURES:
            said, measured = self.heads[name](tapped), labels[name].view(*tapped.shape[:2], -1)
            known = ~measured.isnan()
            terms[name] = 4 * F.smooth_l1_loss(said[known], measured[known], beta=0.3)
        return terms

    def answer_loss(
        self, batch: VideoBatch, hidden: list[Tensor], weights: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of answer tokens, summed per answer; the weighted mean over answers."""
        by_family = torch.tensor([weights[family] for family in ASKED])
        total = torch.zeros(())
        total_weight = torch.zeros(())
        hits: dict[str, list[float]] = {}
        for block, states in zip(batch.blocks, hidden, strict=True):
            is_answer = block.targets != IGNORED
            logits = self.model.lm_head(states[is_answer]).float()
            targets = block.targets[is_answer]
            by_token = F.cross_entropy(logits, targets, reduction="none")
            by_answer = by_family[block.families]  # [B, questions]
            total = total + by_token @ by_answer[..., None].expand_as(is_answer)[is_answer]
            total_weight = total_weight + by_answer.sum()
            wrong = torch.zeros(block.targets.shape, dtype=torch.bool)
            wrong[is_answer] = logits.detach().argmax(dim=-1) != targets
            is_right = ~wrong.any(dim=-1)
            for family, right in zip(
                block.families.flatten().tolist(), is_right.flatten().tolist(), strict=True
            ):
                hits.setdefault(ASKED[family], []).append(float(right))
        loss = total / total_weight
        figures = {family: sum(found) / len(found) for family, found in hits.items()}
        return loss, figures | {"loss": float(loss.detach())}
