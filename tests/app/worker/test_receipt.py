"""What a receipt takes over from the engine's report."""

from dataclasses import replace

from app.worker.receipt import make_done_event
from dycoke_core.sequence import FinishReason
from tests.app.worker.test_publisher import delivery_of
from tests.integration.fake_engine import make_report


def test_a_receipt_says_how_often_the_answer_paused() -> None:
    report = replace(make_report([1, 2, 3]), preemptions=2)
    done = make_done_event(
        delivery_of("a"),
        report,
        finish_reason=FinishReason.STOP,
        first_token_at_s=1.0,
        ended_at_s=2.0,
    )
    assert done.preemptions == 2
