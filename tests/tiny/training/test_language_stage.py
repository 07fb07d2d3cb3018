"""The second stage: which tokens are dropped, its curriculum, and how answers count."""

import numpy as np
import pytest
import torch

from dycoke_core.tiny.architecture import new_model
from dycoke_core.tiny.training import language_stage
from dycoke_core.tiny.training.batches import (
    ASKED,
    BatchKey,
    video_batch,
)
from dycoke_core.tiny.training.language_stage import choose_tokens, plan_step


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
