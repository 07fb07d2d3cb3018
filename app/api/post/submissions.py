"""From a posted request to a job: its place, its body, its checks, its video, its record.

The order is the contract: whoever cannot be served is refused before the body is read, and what is
wrong with fields or video is told before the headers of the answer go out.
"""

import asyncio
import hashlib
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from starlette.requests import Request

from app.api.connection.disconnect import unless_disconnected
from app.api.context import Api
from app.api.errors import FieldProblem, InvalidFieldsError
from app.api.post.admission import Place, choose_model, served_models
from app.api.post.intake import (
    JSON,
    MULTIPART,
    check_content_type,
    check_idempotency_key,
    read_form_fields,
    read_json_fields,
)
from app.api.post.reading import Reading
from app.api.schemas import ChatFields
from app.errors import DeadlineExceededError, StoreUnavailableError, VideoNotFoundError
from app.messages import JobRequest, JobState, ModelCard
from app.store.job_queue import Idempotency, JobRecord
from app.video_store import Upload, VideoLease
from dycoke_core.config import CompressionConfig
from dycoke_core.errors import PromptTooLongError
from dycoke_core.video import FrameSpec

STORE_LIMIT_S = 5.0  # for saying yes or no at the door
MIN_READ_TIMEOUT_S = 1.0  # left for reading after a slow probe
MAX_DRAWN_SEED = 2**53  # exact in every client's JSON
MAX_CHARS_PER_TOKEN = 16  # on average, in a long text; tokenizers come to 3 to 5


@dataclass(frozen=True, slots=True)
class PostedJob:
    """Args:
    is_new: False: an earlier job with the same idempotency key stands for the request.
    has_key: a later request may find the job by its idempotency key.
    """

    record: JobRecord
    fields: ChatFields
    is_new: bool
    has_key: bool


@dataclass(frozen=True, slots=True)
class StoredUpload:
    lease: VideoLease
    upload_s: float
    probe_s: float


async def post_job(
    api: Api,
    request: Request,
    principal: str,
    idempotency_key: str | None,
    traceparent: str | None = None,
) -> PostedJob:
    """Takes a request in and starts reading its video.

    Args:
        principal: who asks; idempotency keys of two principals never meet.
        traceparent: the span that the job belongs to.

    Raises:
        DycokeError: refused; nothing of the request is left.
        ClientLeftError
    """
    accepted_at_s = time.time()
    check_idempotency_key(idempotency_key)
    kind = check_content_type(request, JSON, MULTIPART)
    models, place = await _enter(api)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(place.release)
        async with limited_intake(api):
            fields, card, video = await _take_in(api, request, kind, models)
            stack.callback(video.lease.release)
            await place.move(card.model, max_jobs=api.settings.max_queued_jobs)
        _check_clip(fields, video.lease)
        job = _job_request(api, fields, card, video, place.job_id, accepted_at_s)
        job = job.model_copy(update={"traceparent": traceparent})
        idempotency = _idempotency(api, idempotency_key, principal, fields, job.video_id)
        try:
            job_id = await api.queue.create(job, idempotency=idempotency)
        except StoreUnavailableError:
            # It may have been created all the same, and nobody would read its frames.
            api.cancellations.start(job.job_id, "the job store failed")
            raise
        if job_id != job.job_id:
            return PostedJob(await api.queue.get(job_id), fields, is_new=False, has_key=True)
        api.tracing.record("receive", traceparent, start_s=accepted_at_s)
        api.reading.start(
            Reading(
                request=job,
                spec=_frame_spec(fields, card),
                video=video.lease,
                place=place,
                read_timeout_s=max(api.settings.read_timeout_s - video.probe_s, MIN_READ_TIMEOUT_S),
            )
        )
        stack.pop_all()  # the reading has them now
    return PostedJob(_new_record(job), fields, is_new=True, has_key=idempotency is not None)


@asynccontextmanager
async def limited_intake(api: Api) -> AsyncIterator[None]:
    """Bounds how long a body may take to come in and its video to be probed.

    Raises:
        DeadlineExceededError
        ShuttingDownError: the server cannot wait any longer.
    """
    try:
        async with api.drain.until_expired(), asyncio.timeout(api.settings.job_timeout_s) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceededError("the request took too long to come in") from None


async def store_upload(api: Api, upload: Upload) -> tuple[VideoLease, float]:
    """Stores an upload that the readers can read, unless its content is there already.

    Returns:
        The video, and the seconds that the probe took.

    Raises:
        VideoError: it is no video that we take; it is not stored.
    """
    video_id = await upload.finish()
    with suppress(VideoNotFoundError):
        return await api.videos.lease(video_id), 0.0
    began_at = time.monotonic()
    probe = await api.readers.probe(upload.path)
    return await api.videos.commit(upload, video_id, probe), time.monotonic() - began_at


async def _enter(api: Api) -> tuple[dict[str, ModelCard], Place]:
    """Reserves a place, with the first model until the body names one."""
    api.drain.check()
    try:
        async with asyncio.timeout(STORE_LIMIT_S):
            models = await served_models(api.registry)
            place = await Place.reserve(
                api.queue,
                next(iter(models)),
                f"job_{uuid.uuid4().hex}",
                max_jobs=api.settings.max_queued_jobs,
                lease_s=api.settings.lease_s,
            )
    except TimeoutError:
        raise StoreUnavailableError("the job store does not answer") from None
    return models, place


async def _take_in(
    api: Api, request: Request, kind: str, models: dict[str, ModelCard]
) -> tuple[ChatFields, ModelCard, StoredUpload]:
    """Reads and checks the body, then makes sure of the video."""
    began_at = time.monotonic()
    if kind == JSON:
        fields = await read_json_fields(request)
        card = _check(api, fields, models)
        return fields, card, await _find_video(api, request, fields)
    async with api.videos.receive() as upload:
        fields, has_video = await read_form_fields(request, upload)
        card = _check(api, fields, models)
        if not has_video:
            return fields, card, await _find_video(api, request, fields)
        upload_s = time.monotonic() - began_at
        lease, probe_s = await unless_disconnected(request.receive, store_upload(api, upload))
        return fields, card, StoredUpload(lease, upload_s, probe_s)


def _check(api: Api, fields: ChatFields, models: dict[str, ModelCard]) -> ModelCard:
    """Raises for every field that is wrong whatever the video."""
    fields.check_limits(api.settings)
    fields.compression_config(api.default_compression)
    card = choose_model(models, fields.model)
    _check_text(fields, card)
    _frame_spec(fields, card)
    return card


def _check_text(fields: ChatFields, card: ModelCard) -> None:
    """Keeps out of Redis what no worker could take. Counting tokens is the worker's."""
    num_chars = sum(len(turn.content) for turn in fields.turns())
    if num_chars > MAX_CHARS_PER_TOKEN * card.max_model_tokens:
        raise PromptTooLongError(
            f"{num_chars} characters of text do not fit the model's {card.max_model_tokens} tokens"
        )


async def _find_video(api: Api, request: Request, fields: ChatFields) -> StoredUpload:
    assert fields.video_id is not None
    lease = await unless_disconnected(request.receive, api.videos.lease(fields.video_id))
    return StoredUpload(lease, upload_s=0.0, probe_s=0.0)


def _check_clip(fields: ChatFields, lease: VideoLease) -> None:
    duration_s = lease.video.probe.duration_s
    if fields.start_s is not None and duration_s is not None and fields.start_s >= duration_s:
        raise InvalidFieldsError(
            [FieldProblem(field="start_s", message=f"the video ends at {duration_s:.3f} s")]
        )


def _frame_spec(fields: ChatFields, card: ModelCard) -> FrameSpec:
    return FrameSpec(
        num_frames=fields.num_frames,
        image_size=card.image_size,
        start_s=fields.start_s,
        end_s=fields.end_s,
    )


def _job_request(
    api: Api,
    fields: ChatFields,
    card: ModelCard,
    video: StoredUpload,
    job_id: str,
    accepted_at_s: float,
) -> JobRequest:
    compression: CompressionConfig = fields.compression_config(api.default_compression)
    seed = secrets.randbelow(MAX_DRAWN_SEED) if fields.seed is None else fields.seed
    return JobRequest(
        job_id=job_id,
        model=card.model,
        video_id=video.lease.video.video_id,
        messages=fields.turns(),
        max_tokens=fields.max_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        seed=seed,
        stop=fields.stop,
        compression=compression.as_dict(),
        weights_digest=card.weights_digest,
        dtype=card.dtype,
        prefill_chunk_tokens=card.prefill_chunk_tokens,
        sampler_version=card.sampler_version,
        accepted_at_s=accepted_at_s,
        deadline_at_s=accepted_at_s + api.settings.job_timeout_s,
        upload_s=video.upload_s,
        read_frames_s=video.probe_s,
    )


def _idempotency(
    api: Api, key: str | None, principal: str, fields: ChatFields, video_id: str
) -> Idempotency | None:
    if key is None:
        return None
    said = fields.model_copy(update={"video_id": video_id}).model_dump(mode="json")
    return Idempotency(
        key_hash=_digest(f"{principal}\0{key}"),
        fingerprint=_digest(json.dumps(said, sort_keys=True)),
        ttl_s=api.settings.job_timeout_s + api.settings.result_ttl_s,
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _new_record(job: JobRequest) -> JobRecord:
    return JobRecord(
        job_id=job.job_id,
        model=job.model,
        state=JobState.READING,
        attempts=0,
        accepted_at_s=job.accepted_at_s,
        queued_at_s=None,
        started_at_s=None,
        ended_at_s=None,
        request=job,
        position=None,
    )
