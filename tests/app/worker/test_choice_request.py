"""A choice that is made as late as possible: once it is due, or a prefix that fits has come."""

import time
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from app.worker.choice_request import ChoiceRequest
from dycoke_core.auto import DEFAULT_LADDER, AutoConfig, CachedChoice, Choice, Reason
from dycoke_core.engine import Engine
from dycoke_core.level_choice import NOTHING_WAITS
from tests.engine.recording import make_sequence

CONFIG = AutoConfig(objective_s=1000.0)  # of no test


def choice(level: int) -> Choice:
    return Choice(level, DEFAULT_LADDER[level], Reason.OBJECTIVE, 0.5)


@dataclass
class Chooser:
    """An engine that has some prefixes, and chooses among those alone if it is asked to."""

    present: set[str] = field(default_factory=set)
    can: bool = False  # it has little else to do
    taken: dict[str, Choice] = field(default_factory=lambda: {"k1": choice(1), "k2": choice(2)})
    num_cached: int = 0
    waits: list[tuple[float, float]] = field(default_factory=list)

    def choose_cached(self, *_: Any, waited_s: float, queued_s: float) -> CachedChoice:
        self.num_cached += 1
        self.waits.append((waited_s, queued_s))
        found = next((self.taken[key] for key in sorted(self.present) if key in self.taken), None)
        return CachedChoice(found, frozenset({"k1", "k2"}))

    def choose_compression(self, *_: Any, waited_s: float, queued_s: float) -> Choice:
        self.waits.append((waited_s, queued_s))
        return choice(3)

    def can_choose(self, *_: Any) -> bool:
        return self.can

    def has_prefix(self, key: str) -> bool:
        return key in self.present


def request(chooser: Chooser, **times: float) -> tuple[ChoiceRequest, Engine]:
    now = time.time()
    said = {"accepted_at_s": now, "queued_at_s": now, **times}
    asked = ChoiceRequest(make_sequence(num_frames=1), CONFIG, lambda: NOTHING_WAITS, **said)
    return asked, cast(Engine, chooser)


def test_a_prefix_that_is_there_is_taken() -> None:
    asked, engine = request(Chooser({"k2"}))
    assert asked.choose_cached(engine)
    assert asked.cached == choice(2) == asked.choose(engine)


def test_without_one_the_choice_is_free() -> None:
    asked, engine = request(Chooser())
    assert not asked.choose_cached(engine) and asked.cached is None
    assert asked.prefix_keys == {"k1", "k2"}
    assert asked.choose(engine) == choice(3)


def test_it_is_due_when_the_engine_has_little_else_to_do() -> None:
    chooser = Chooser()
    asked, engine = request(chooser)
    asked.choose_cached(engine)
    assert not asked.is_due(engine)
    chooser.can = True
    assert asked.is_due(engine)


def test_it_is_due_when_a_prefix_has_come_that_was_not_tried() -> None:
    chooser = Chooser()
    asked, engine = request(chooser)
    asked.choose_cached(engine)
    chooser.present = {"k1"}
    assert asked.is_due(engine) and asked.choose(engine) == choice(1)


def test_a_prefix_that_was_tried_is_not_asked_about_again() -> None:
    chooser = Chooser({"k1"}, taken={})
    asked, engine = request(chooser)
    asked.choose_cached(engine)
    for _ in range(3):
        assert not asked.is_due(engine)
    assert chooser.num_cached == 1
    chooser.present = {"k1", "k2"}
    assert not asked.is_due(engine) and chooser.num_cached == 2
    assert not asked.is_due(engine) and chooser.num_cached == 2


def test_a_job_that_is_late_waits_no_longer() -> None:
    chooser = Chooser()
    asked, engine = request(chooser, accepted_at_s=time.time() - 2000.0)
    assert asked.is_due(engine) and chooser.num_cached == 0


def test_waiting_counts_from_acceptance_and_from_the_queue_and_never_backwards() -> None:
    now = time.time()
    chooser = Chooser()
    asked, engine = request(chooser, accepted_at_s=now - 50.0, queued_at_s=now - 20.0)
    asked.choose(engine)
    ((waited_s, queued_s),) = chooser.waits
    assert waited_s == pytest.approx(50.0, abs=10) and queued_s == pytest.approx(20.0, abs=10)
    ahead, _ = request(chooser, accepted_at_s=now + 1000.0, queued_at_s=now + 1000.0)
    assert (ahead.waited_s, ahead.queued_s) == (0.0, 0.0), "another machine's clock is ahead"
