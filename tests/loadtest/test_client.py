"""What one client sees of one answer, and how it sends a question."""

from typing import Any

import pytest

from loadtest.client import Answer, Event


def test_answer_measures_from_the_request_to_each_token() -> None:
    answer = Answer(began_at_s=10.0)
    said: list[tuple[str, float, dict[str, Any]]] = [
        ("job", 10.1, {"job_id": "j", "video_id": "v"}),
        ("status", 10.2, {}),
        ("token", 10.5, {"token_ids": [1, 2]}),
        ("token", 10.7, {"token_ids": [3]}),
        ("done", 11.0, {"usage": {}}),
    ]
    for number, (name, at_s, data) in enumerate(said):
        answer.see(Event(name, data, f"{number}-0" if name != "status" else None, at_s))
    assert (answer.job_id, answer.video_id, answer.token_ids) == ("j", "v", [1, 2, 3])
    assert answer.ttft_s == pytest.approx(0.5)
    assert answer.gaps_s == pytest.approx([0.2])
    assert answer.total_s == pytest.approx(1.0)
    assert answer.last_event_id == "4-0" and answer.receipt == {"usage": {}}
