"""What a job has to publish, and how its tokens share events."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.messages import StatusEvent, TokenEvent
from app.store.job_leases import Delivery
from app.worker.running_jobs import RunningJob
from dycoke_core import sequence as core
from dycoke_core.auto import AutoConfig
from dycoke_core.config import Priority
from tests.integration.jobs import make_request


def running_job(
    job_id: str = "j", *, queued_at_s: float = 0.0, priority: Priority = "normal"
) -> RunningJob:
    delivery = Delivery(
        job_id=job_id,
        entry_id="1-0",
        worker_id="w",
        attempt=1,
        request=make_request(job_id).model_copy(update={"priority": priority}),
        published=(),
        queued_at_s=queued_at_s,
        started_at_s=0.0,
        first_token_at_s=None,
        is_suspect=False,
        sampler_version=None,
    )
    return RunningJob.of(delivery)


def made(index: int, text: str | None = None, num_tokens: int = 1) -> core.TokenEvent:
    token_ids = tuple(range(index, index + num_tokens))
    return core.TokenEvent("j#1", index, token_ids, f"t{index} " if text is None else text)


def test_tokens_made_since_the_last_append_share_an_event() -> None:
    job = running_job()
    job.fresh += [made(0), made(1), made(2)]
    assert job.append().events == [TokenEvent(index=0, text="t0 t1 t2 ", token_ids=[0, 1, 2])]


def test_event_that_was_sent_stays_as_it_is() -> None:
    """A client may have seen it, although the worker got no reply."""
    job = running_job()
    job.fresh += [made(0), made(1)]
    first = job.append().events
    job.fresh += [made(2), made(3)]
    assert job.append().events == [*first, TokenEvent(index=2, text="t2 t3 ", token_ids=[2, 3])]
    job.next_index = 2
    assert [event.index for event in job.append().events if isinstance(event, TokenEvent)] == [2]
    job.next_index = 4
    assert not job.has_unsent


def test_text_behind_the_last_token_has_an_event_of_its_own() -> None:
    job = running_job()
    job.fresh += [made(0), made(1), made(2, "end", num_tokens=0)]
    events = job.append().events
    assert events[1] == TokenEvent(index=2, text="end", token_ids=[])
    job.next_index = 2  # Redis has the tokens and not the text
    assert job.append().events == events[1:]


def test_statuses_come_before_tokens() -> None:
    job = running_job()
    job.fresh.append(made(0))
    job.statuses.append(StatusEvent(stage="prefilling"))
    assert [event.type for event in job.append().events] == ["status", "token"]


def test_what_is_no_text_is_refused_where_the_event_is_made() -> None:
    job = running_job()
    job.fresh.append(made(0, text="\ud800"))
    with pytest.raises(ValueError):
        job.append()


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=20))
def test_whatever_gets_through_every_token_is_sent_once(steps: list[tuple[int, bool]]) -> None:
    """Each step makes some tokens, then an append gets through or not."""
    job, log, num_made = running_job(), [], 0
    for number, gets_through in [*steps, (1, True)]:
        job.fresh += [made(num_made + i) for i in range(number)]
        num_made += number
        for event in job.append().events if gets_through else ():
            assert isinstance(event, TokenEvent) and event.index == job.next_index
            log.append(event)
            job.next_index = event.next_index
    assert [token_id for event in log for token_id in event.token_ids] == list(range(num_made))
    assert "".join(event.text for event in log) == "".join(f"t{i} " for i in range(num_made))


def test_a_first_token_is_in_time_from_acceptance_on() -> None:
    job = running_job()
    accepted_at_s = job.delivery.request.accepted_at_s
    assert not job.has_begun_within(2.0), "there is none"
    job.first_token_at_s = accepted_at_s + 1.5
    assert job.has_begun_within(2.0) and not job.has_begun_within(1.0)
    assert job.objective_s is None
    asked = {"compression": AutoConfig(2.5).as_dict()}
    request = job.delivery.request.model_copy(update=asked)
    assert RunningJob.of(replace(job.delivery, request=request)).objective_s == 2.5
