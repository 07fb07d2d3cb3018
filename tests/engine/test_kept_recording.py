"""What a sequence that asks for its kept sets gets, on both backends."""

from typing import Any

import numpy as np
import pytest
import torch

from dycoke_core.kept_sets import KeptHistory
from dycoke_core.sequence import Sequence
from tests.compression import slow_loops
from tests.engine.lab import Lab
from tests.engine.recording import RecordingEngine, report_of

ASKS: dict[str, dict[str, Any]] = {
    "default": {"num_frames": 7, "video": 2},
    "gated": {"num_frames": 7, "compression": {"policy": "dycoke", "threshold": 0.1, "l": 2}},
    "layer 0": {"num_frames": 5, "compression": {"policy": "dycoke", "l": 0}},
    "released": {"num_frames": 8, "compression": {"policy": "dycoke", "variant": "released"}},
    "random": {"compression": {"policy": "random_kv", "threshold": 0.1, "seed": 2}},
    "one shot": {"compression": "dycoke_one_shot"},
    "none kept": {"compression": {"policy": "dycoke", "p": 1.0}},
    "vidcom2": {"compression": {"policy": "vidcom2", "retained_ratio": 0.4}},
}


def asking(lab: Lab, name: str = "a", **ask: Any) -> Sequence:
    sequence = lab.sequence(name, **ask)
    sequence.wants_kept_sets = True
    return sequence


def places(bitset: bytes | None) -> list[int]:
    assert bitset is not None
    return np.flatnonzero(np.unpackbits(np.frombuffer(bitset, np.uint8))).tolist()


def kept_by_stage_one(engine: RecordingEngine, sequence: Sequence) -> list[int]:
    """In the order in which the tokens stand in the prompt."""
    state = engine.states[sequence.sequence_id]
    assert state.held_prefix.kept is not None
    return state.held_prefix.kept.tolist()


def run(engine: RecordingEngine, sequence: Sequence) -> tuple[KeptHistory | None, list[int]]:
    engine.add(sequence)
    kept: list[int] = []
    history = None
    while engine.has_work:
        if sequence.output_token_ids and not kept and sequence.sequence_id in engine.states:
            kept = kept_by_stage_one(engine, sequence)
        for event in engine.step():
            if event.report is not None:
                history = event.report.kept
    return history, kept


@pytest.mark.parametrize("name", ASKS)
def test_every_tokens_set_is_the_one_that_its_step_used(name: str, lab: Lab) -> None:
    engine = lab.engine()
    history, kept = run(engine, asking(lab, **ASKS[name]))
    recorded = engine.recordings["a"].kept
    assert history is not None and not history.is_truncated
    assert places(history.stage_one) == sorted(kept)
    if name == "vidcom2":
        assert recorded == [] and history.last is None
        return
    assert len(recorded) == history.num_tokens - 1
    for token, expected in enumerate(recorded, start=1):
        assert places(history.stage_two(token)) == sorted(kept[place] for place in expected)
    assert history.last == history.stage_two(history.num_tokens - 1)


@torch.inference_mode()
def test_stage_one_is_what_a_slow_loop_keeps(lab: Lab) -> None:
    sequence = asking(lab, num_frames=7)
    history = report_of(lab.engine().run(sequence)["a"]).kept
    *_, features = lab.reference_model.encode_frames(torch.from_numpy(sequence.frames))
    assert history is not None and features is not None
    assert places(history.stage_one) == slow_loops.ttm(features, 0.7)
    assert (history.units, history.rows * history.columns) == (7, lab.tokens_per_frame)
    assert history.rows == history.columns


def test_full_tokens_are_all_kept(lab: Lab) -> None:
    history, _ = run(lab.engine(), asking(lab, compression="full", num_frames=3))
    assert history is not None and history.last is None
    assert places(history.stage_one) == list(range(3 * lab.tokens_per_frame))
    assert history.stage_two(4) is None


def test_a_prefix_hit_knows_what_was_kept_when_nobody_asked(lab: Lab) -> None:
    engine = lab.engine()
    first = report_of(engine.run(lab.sequence("first", num_frames=7))["first"])
    assert first.kept is None
    second = report_of(engine.run(asking(lab, "second", num_frames=7))["second"])
    cold = report_of(lab.engine().run(asking(lab, num_frames=7))["a"])
    assert second.cache.has_prefix_hit and not cold.cache.has_prefix_hit
    assert second.kept == cold.kept is not None


def test_company_changes_no_set(lab: Lab) -> None:
    alone = report_of(lab.engine().run(asking(lab, video=2))["a"]).kept
    company = (lab.sequence("b", video=1), asking(lab, "c", video=3), lab.sequence("d", video=2))
    events = lab.engine().run(asking(lab, video=2), *company)
    assert report_of(events["a"]).kept == alone
    assert report_of(events["b"]).kept is None
    assert report_of(events["c"]).kept not in (None, alone)


@pytest.mark.parametrize("num_forced", [1, 5, 12])
def test_a_resumed_answer_knows_the_sets_of_all_its_tokens(num_forced: int, lab: Lab) -> None:
    """Those of published tokens too: they are replayed."""
    whole = asking(lab, video=2)
    expected = report_of(lab.engine().run(whole)["a"]).kept
    resumed = asking(lab, "b", video=2, forced=tuple(whole.output_token_ids[:num_forced]))
    assert report_of(lab.engine().run(resumed)["b"]).kept == expected


def test_without_a_video_nothing_is_kept(lab: Lab) -> None:
    sequence = asking(lab)
    sequence.frames = None
    assert report_of(lab.engine().run(sequence)["a"]).kept is None


def test_an_answer_of_one_token_has_no_second_stage(lab: Lab) -> None:
    history, _ = run(lab.engine(), asking(lab, max_tokens=1))
    assert history is not None and history.last is None and history.num_tokens == 1
