"""Jobs by id: status, events, cancellation."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response

from app.api.answer.sse import Ending, EventStream
from app.api.context import Api, ApiDep, AskerDep
from app.api.errors import InvalidFieldsError
from app.api.openapi import EVENT_STREAM_RESPONSES, PROBLEMS
from app.api.schemas import JobResource, KeptResource
from app.errors import JobNotDoneError, KeptSetDroppedError, KeptSetsNotFoundError
from app.messages import DoneEvent, ErrorEvent, JobState
from app.store.event_log import FIRST_EVENT, parse_event_id
from app.store.job_queue import JobRecord
from dycoke_core import kept_sets
from dycoke_core.kept_sets import KeptHistory

router = APIRouter(tags=["jobs"], responses=PROBLEMS)


@router.get("/v1/jobs/{job_id}", summary="A job's state, and its answer once it has ended")
async def get_job(job_id: str, api: ApiDep, principal: AskerDep) -> JobResource:
    return await _resource(api, await api.jobs.find(job_id, principal.owner))


@router.delete("/v1/jobs/{job_id}", summary="Cancel a job; one that has ended stays as it is")
async def cancel_job(job_id: str, api: ApiDep, principal: AskerDep) -> JobResource:
    await api.jobs.find(job_id, principal.owner)
    await api.cancellations.cancel(job_id, "cancelled on request")
    return await _resource(api, await api.jobs.find(job_id, principal.owner))


@router.get(
    "/v1/jobs/{job_id}/kept",
    summary="Which visual tokens were kept when a token of the answer was made",
)
async def get_kept(
    job_id: str,
    api: ApiDep,
    principal: AskerDep,
    token: Annotated[int, Query(ge=0, description="Its index in the answer.")],
) -> KeptResource:
    """Of a job that asked for `kept_mask`, once it is done."""
    record = await api.jobs.find(job_id, principal.owner)
    if record.request.kept_mask and not record.state.is_final:
        raise JobNotDoneError(
            "the job has not ended yet, and what it kept is known then: ask again"
        )
    blob = await api.kept_sets.get(job_id) if record.state is JobState.DONE else None
    if blob is None:
        raise KeptSetsNotFoundError(
            "nothing is stored of what this job kept: it must have had a video and 'kept_mask', "
            "and have been answered to its end"
        )
    try:
        return await asyncio.to_thread(lambda: KeptResource.of(KeptHistory.decode(blob), token))
    except IndexError:
        raise InvalidFieldsError.of(
            "token", "the answer has fewer tokens: count them from 0"
        ) from None
    except kept_sets.KeptSetDroppedError:
        raise KeptSetDroppedError(
            "what was kept at this token is not stored, as earlier tokens took all the room: "
            "ask for an earlier one"
        ) from None


@router.get(
    "/v1/jobs/{job_id}/events",
    summary="Read a job's events, from the start or after Last-Event-ID",
    response_class=Response,
    responses=EVENT_STREAM_RESPONSES,
)
async def get_events(
    job_id: str,
    request: Request,
    api: ApiDep,
    principal: AskerDep,
    last_event_id: Annotated[
        str | None, Header(description="The id of the last event that was seen.")
    ] = None,
) -> Response:
    """Closing this connection cancels nothing."""
    after = FIRST_EVENT if last_event_id is None else parse_event_id(last_event_id)
    record = await api.jobs.find(job_id, principal.owner)
    if last_event_id is not None:
        api.metrics.count_resume()
        if await api.jobs.is_read_to_its_end(record, after=after):
            return Response(status_code=204)  # makes an EventSource stop reconnecting
    feed = api.jobs.feed(record, after=after)
    slot = api.streams.take(request, principal.owner)

    def on_end(_: Ending) -> None:
        slot.release()

    return EventStream(job_id, feed.batches(), drain=api.drain, on_end=on_end)


async def _resource(api: Api, record: JobRecord) -> JobResource:
    final = await api.jobs.final(record)
    return JobResource(
        job_id=record.job_id,
        state=record.state,
        model=record.model,
        video_id=record.request.video_id,
        question=record.request.messages[-1].content,
        attempts=record.attempts,
        priority=record.request.priority,
        position=record.position,
        accepted_at_s=record.accepted_at_s,
        queued_at_s=record.queued_at_s,
        started_at_s=record.started_at_s,
        deadline_at_s=record.request.deadline_at_s,
        ended_at_s=record.ended_at_s,
        result=final if isinstance(final, DoneEvent) else None,
        error=final if isinstance(final, ErrorEvent) else None,
    )
