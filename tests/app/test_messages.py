"""What is read of an event's JSON without reading all of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.messages import (
    ErrorEvent,
    Event,
    JobEvent,
    StatusEvent,
    TokenEvent,
    event_type,
    num_tokens,
)


@pytest.mark.parametrize(
    "event",
    [
        JobEvent(job_id="j", video_id="v", model="m", compression={"type": "x"}),
        StatusEvent(stage="queued", position=1),
        TokenEvent(index=0, text='"type":"done"', token_ids=[1]),
        ErrorEvent(code="c", message="m", retryable=True, job_id="j"),
    ],
)
def test_type_is_read_in_any_order_of_fields(event: Event) -> None:
    data = event.model_dump_json()
    assert event_type(data.encode()) == event.type
    backwards = dict(reversed(json.loads(data).items()))  # as a script of Redis may write it
    assert event_type(json.dumps(backwards).encode()) == event.type


@given(st.text(), st.lists(st.integers(0, 2**31), max_size=5))
def test_tokens_are_counted_whatever_the_text(text: str, token_ids: list[int]) -> None:
    for said in (text, f'{text}"token_ids":[1,2],', f"{text}]["):
        event = TokenEvent(index=3, text=said, token_ids=token_ids)
        assert num_tokens(event.model_dump_json().encode()) == len(token_ids)
