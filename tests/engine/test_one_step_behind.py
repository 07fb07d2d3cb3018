"""A device that runs a step behind the host: what comes back late changes nothing that shows.

What can go wrong here cannot happen on a device that keeps up with its host.
"""

from typing import Any

import pytest

from dycoke_core.engine.backend import StepPlan
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import FinishReason
from tests.engine.lab import Lab
from tests.engine.recording import assert_same, counts, report_of, steps_until_tokens

on_cuda = pytest.mark.parametrize("lab", ["cuda"], indirect=True)

POLICIES: dict[str, dict[str, Any]] = {
    "full": {"compression": "full"},
    "default": {"video": 2, "max_tokens": 20},
    "gated": {"video": 2, "compression": {"policy": "dycoke", "threshold": 0.1, "l": 2}},
    "layer 0": {"compression": {"policy": "dycoke", "l": 0}},
    "layer 1": {"num_frames": 5, "compression": {"policy": "dycoke", "l": 1, "p": 0.9}},
    "random": {"compression": {"policy": "random_kv", "threshold": 0.1, "seed": 2}},
    "lowest": {"compression": {"policy": "lowest_kv"}},
    "one shot": {"compression": "dycoke_one_shot", "max_tokens": 3},
    "none kept": {"compression": {"policy": "dycoke", "p": 1.0}},
    "no visual token": {"compression": {"policy": "vidcom2", "retained_ratio": 0}},
    "drawn": {"video": 3, "temperature": 0.9, "top_p": 0.8, "seed": 5},
    "one token": {"max_tokens": 1},
    # Over several pages, and longer than what one work item of attention reads.
    "long answer": {"max_tokens": 140, "compression": {"policy": "dycoke", "threshold": 0.1}},
    "long list": {"num_frames": 32, "compression": {"policy": "dycoke", "k": 0, "p": 0.05, "l": 1}},
}


class Plans:
    """What a backend was asked to run."""

    def __init__(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[StepPlan] = []
        run = lab.backend_class.run

        def note(backend: Any, plan: StepPlan) -> Any:
            self.all.append(plan)
            return run(backend, plan)

        monkeypatch.setattr(lab.backend_class, "run", note)

    @property
    def num_decode_rows(self) -> int:
        return sum(len(plan.decode) for plan in self.all)


@on_cuda
@pytest.mark.parametrize("dp_cache", ["device", "host"])
def test_both_backends_give_the_same_logits_kept_sets_and_receipts(
    dp_cache: str, lab: Lab, twin: Lab
) -> None:
    engines = [each.engine(dp_cache=dp_cache, max_running_sequences=5) for each in (lab, twin)]
    (ours, theirs) = (
        engine.run(*(lab.sequence(name, **ask) for name, ask in POLICIES.items()))
        for engine in engines
    )
    for name in POLICIES:
        assert_same(engines[0].recordings[name], engines[1].recordings[name])
        mine, other = ours[name], theirs[name]
        assert [(e.index, e.token_ids, e.text, e.finish_reason) for e in mine] == [
            (e.index, e.token_ids, e.text, e.finish_reason) for e in other
        ]
        assert counts(report_of(mine)) == counts(report_of(other))


@on_cuda
def test_every_event_comes_one_step_after_its_launch(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = Plans(lab, monkeypatch)
    engine = lab.engine()
    assert engine.backend.depth == 1
    engine.add(lab.sequence(max_tokens=5))
    launched_at, came_at = [], []
    for step in range(100):
        if not engine.has_work:
            break
        num_before = len(plans.all)
        events = engine.step()
        launched_at += [step for plan in plans.all[num_before:] if plan.draws]
        came_at += [step for _ in events]
    assert len(came_at) == 5
    assert came_at == [step + 1 for step in launched_at]


def test_no_step_is_launched_beyond_max_tokens(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = Plans(lab, monkeypatch)
    engine = lab.engine()
    engine.run(*(lab.sequence(str(n), max_tokens=n, video=n) for n in (1, 2, 5)))
    assert plans.num_decode_rows == 0 + 1 + 4


def wasted_rows(lab: Lab) -> int:
    """Decode rows of a sequence that has ended."""
    return 1 if lab.backend == "cuda" else 0


def test_an_end_token_costs_one_row_and_shows_nowhere(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lab.alone()
    place, end_token = next(
        (place, token) for place, token in enumerate(whole.token_ids) if place >= 4
    )
    place = whole.token_ids.index(end_token)
    model = LlavaOnevision(
        lab.model.model,
        lab.model.prompt_encoder,
        lab.model.normalizer,
        frozenset([end_token]),
        lab.model.weights_digest,
    )
    plans = Plans(lab, monkeypatch)
    engine = lab.engine(model)
    sequence = lab.sequence()
    events = engine.run(sequence)["a"]
    assert events[-1].finish_reason is FinishReason.STOP
    assert sequence.output_token_ids == whole.token_ids[: place + 1]
    assert report_of(events).compression.decode_steps == place
    assert engine.recordings["a"].refreshes == whole.recording.refreshes[:place]
    assert plans.num_decode_rows == place + wasted_rows(lab)
    assert not engine.has_work


def test_a_stop_string_is_cut_off_with_all_behind_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = lab.alone().report.text
    stop = text[20:24]
    plans = Plans(lab, monkeypatch)
    events = lab.engine().run(lab.sequence(stop=(stop,)))["a"]
    assert events[-1].finish_reason is FinishReason.STOP
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    assert len(events) < 12
    assert plans.num_decode_rows == len(events) - 1 + wasted_rows(lab)


def test_a_sequence_that_ends_makes_room_for_the_next_one_at_once(lab: Lab) -> None:
    """The newcomer takes seat, pages and row of one whose last step may still be on its way."""
    text = lab.alone().report.text
    stop = text[20:24]
    engine = lab.engine(max_running_sequences=1)
    names = ["first", "second", "third"]
    for name in names:
        engine.add(lab.sequence(name, stop=(stop,)))
    gap = 0
    for _ in range(200):
        if not engine.has_work:
            break
        events = engine.step()
        if any(event.finish_reason for event in events) and engine.stats().num_waiting:
            gap += 1
            engine.step()
            assert engine.stats().num_running == 1
    assert gap == 2
    for name in names:
        tokens = len(engine.recordings[name].logits)
        assert_same(engine.recordings[name], engine.recordings["first"])
        assert 0 < tokens < 12


def test_an_abort_while_a_step_is_on_its_way_emits_nothing_more(lab: Lab) -> None:
    engine = lab.engine()
    engine.add(lab.sequence("goes"))
    engine.add(lab.sequence("stays", video=2))
    steps_until_tokens(engine, "goes", 3)
    assert engine.abort("goes")
    events = engine.drain()
    assert "goes" not in events
    assert_same(engine.recordings["stays"], lab.alone(video=2).recording)


def test_an_engine_whose_last_sequence_was_aborted_comes_to_rest(lab: Lab) -> None:
    engine = lab.engine()
    engine.add(lab.sequence())
    steps_until_tokens(engine, "a", 2)
    engine.abort("a")
    for _ in range(2):
        assert engine.step() == []
    assert not engine.has_work
    assert engine.stats().kv_bytes_in_use == 0


def test_an_id_may_be_used_again_while_its_last_step_is_on_its_way(lab: Lab) -> None:
    engine = lab.engine()
    engine.add(lab.sequence("again"))
    steps_until_tokens(engine, "again", 3)
    engine.abort("again")
    del engine.recordings["again"]
    events = engine.run(lab.sequence("again", video=2))["again"]
    assert [event.index for event in events] == list(range(12))
    assert_same(engine.recordings["again"], lab.alone(video=2).recording)


def test_a_failed_step_takes_back_no_token_that_was_chosen_before(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token of the step before is on its way when the next one fails: it comes first."""
    whole = lab.alone()
    engine = lab.engine()
    engine.add(lab.sequence())
    steps_until_tokens(engine, "a", 3)

    def fail(backend: Any, plan: StepPlan) -> Any:
        raise MemoryError

    with monkeypatch.context() as patches:
        patches.setattr(lab.backend_class, "run", fail)
        events = engine.drain()["a"]
    num_late = 1 if lab.backend == "cuda" else 0
    assert [event.token_ids for event in events] == [
        *((token,) for token in whole.token_ids[3 : 3 + num_late]),
        (),
    ]
    assert [event.index for event in events] == list(range(3, 4 + num_late))
    assert events[-1].finish_reason is FinishReason.ERROR


def test_an_answer_that_has_ended_does_not_fail(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after an end token computes nothing that is used; it may as well fail."""
    text = lab.alone().report.text
    stop = text[20:24]
    expected = lab.alone(stop=(stop,))
    last = len(expected.events) - 1
    run = lab.backend_class.run

    def fail_behind_the_end(backend: Any, plan: StepPlan) -> Any:
        own = {row.start for row in plan.decode}
        first = lab.layout().max_own_tokens - 12  # tokens of the question
        if first + last in own:
            raise MemoryError
        return run(backend, plan)

    monkeypatch.setattr(lab.backend_class, "run", fail_behind_the_end)
    events = lab.engine().run(lab.sequence(stop=(stop,)))["a"]
    assert events[-1].finish_reason is FinishReason.STOP
    assert [event.token_ids for event in events] == [e.token_ids for e in expected.events]
