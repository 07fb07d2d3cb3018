"""A minute of chaos with a fixed seed, and a check that the suite finds what it looks for."""

import subprocess
import sys

import pytest

from tests.chaos.ledger import Ledger, View
from tests.chaos.plan import KINDS, plan_faults, plan_questions
from tests.integration.api import SseEvent
from tests.integration.fake_engine import answer, text_of
from tests.integration.workers import ROOT

TIMEOUT_S = 600  # what ends a run that hangs; one takes about 90 s


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 30)
def test_a_minute_of_chaos_breaks_no_promise() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--seed", "1", "--minutes", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_seed_stands_for_the_same_faults_and_questions() -> None:
    assert plan_faults(1, 300, 1.5) == plan_faults(1, 300, 1.5) != plan_faults(2, 300, 1.5)
    assert {fault.kind for fault in plan_faults(1, 300, 1.5)} == set(KINDS)
    questions = plan_questions(1, "a")
    again = plan_questions(1, "a")
    assert [next(questions) for _ in range(20)] == [next(again) for _ in range(20)]


def view_of(*events: SseEvent) -> list[str]:
    """The problems that a view finds in these events, of an answer of three tokens."""
    ledger = Ledger()
    entry = ledger.accept("j", QUESTION)
    view = View(entry, ledger, "reader")
    for event in events:
        view.take(event)
    return [text for _, text in ledger.problems]


QUESTION = next(q for q in plan_questions(1, "a") if q.max_tokens == 3 and not q.is_poison)
IDS = answer(QUESTION.text, 3)
OPENING = SseEvent("job", {}, "0-1")


def token(index: int, token_id: int | None = None) -> SseEvent:
    token_id = IDS[index] if token_id is None else token_id
    data = {"index": index, "token_ids": [token_id], "text": text_of(token_id)}
    return SseEvent("token", data, f"{index + 1}-0")


def done() -> SseEvent:
    text = "".join(map(text_of, IDS))
    data = {"text": text, "usage": {"completion_tokens": 3}, "job_id": "j"}
    return SseEvent("done", data, "4-0")


def test_a_whole_answer_is_no_problem() -> None:
    assert view_of(OPENING, token(0), token(1), token(2), done()) == []


@pytest.mark.parametrize(
    ("events", "complaint"),
    [
        ([OPENING, token(0), token(2)], "token 2 came where 1 was due"),
        ([OPENING, token(0), token(0)], "token 0 came where 1 was due"),
        ([OPENING, token(0, 7)], "not those of an undisturbed run"),
        ([OPENING, token(0), token(1), done()], "done after 2 tokens of 3"),
        ([OPENING, OPENING], "the opening event came twice"),
        ([token(0)], "came before the opening event"),
        ([OPENING, token(0), token(1), token(2), done(), done()], "came after the end"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_answer_is_seen(events: list[SseEvent], complaint: str) -> None:
    assert any(complaint in text for text in view_of(*events))
