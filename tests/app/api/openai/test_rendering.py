"""Chunks of a stream: the quick way to write most of them says what the long one would."""

import json
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from app.api.answer.feed import FeedItem
from app.api.openai.rendering import DONE, ChatCompletion, StreamOptions
from app.messages import ErrorEvent, JobState, StatusEvent, TokenEvent
from app.store.job_queue import JobRecord
from tests.integration.jobs import make_request

RECORD = JobRecord(
    job_id="job_1",
    model='a "content":"" of a model',
    state=JobState.RUNNING,
    attempts=1,
    accepted_at_s=1_700_000_000.5,
    queued_at_s=None,
    started_at_s=None,
    ended_at_s=None,
    request=make_request("job_1"),
    position=None,
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ['"token_ids":[', '","token_ids":[1]', '"text":', "\\", "\u2028", "\x00"]
)


def item(index: int, text: str, **fields: int) -> FeedItem:
    event = TokenEvent(index=index, text=text, token_ids=[7, 8], **fields)
    return FeedItem.of(event, f"{index + 1}-0")


def chunks(data: bytes) -> list[dict[str, Any]]:
    lines = data.decode().split("\n\n")[:-1]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_chunk_in_the_middle_differs_from_the_one_before_in_its_text_alone(
    texts: list[str],
) -> None:
    for options in (StreamOptions(), StreamOptions(include_usage=True)):
        rendering = ChatCompletion(RECORD, options)
        rendering.render([item(0, "first")])
        middle = chunks(rendering.render([item(2 + i, text) for i, text in enumerate(texts)]))
        # With usage on every chunk each one is written the long way.
        long_way = ChatCompletion(RECORD, replace(options, continuous_usage=True))
        long_way.render([item(0, "first")])
        assert middle == chunks(
            long_way.render([item(2 + i, text) for i, text in enumerate(texts)])
        )
        assert [chunk["choices"][0]["delta"] for chunk in middle] == [
            {"content": text} for text in texts
        ]


def test_role_goes_with_the_first_token_and_statuses_say_nothing() -> None:
    rendering = ChatCompletion(RECORD, StreamOptions())
    status = FeedItem.of(StatusEvent(stage="prefilling"))
    assert rendering.render([status]) == b""
    first, second = chunks(rendering.render([item(0, "a"), item(2, "b")]))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
    assert second["choices"][0]["delta"] == {"content": "b"}
    assert rendering.render([status]) == b"" == rendering.render([])
    assert len(chunks(rendering.render([status, item(4, "c")]))) == 1


def test_an_error_in_mid_answer_ends_the_stream_after_the_tokens_before_it() -> None:
    rendering = ChatCompletion(RECORD, StreamOptions())
    rendering.render([item(0, "a")])
    error = ErrorEvent(code="workers_lost", message="m", retryable=True, job_id="job_1")
    data = rendering.render([item(2, "b"), FeedItem.of(error, "5-0")])
    assert data.endswith(DONE)
    token, failure = chunks(data.removesuffix(DONE))
    assert token["choices"][0]["delta"] == {"content": "b"}
    assert failure["error"]["code"] == "workers_lost"
