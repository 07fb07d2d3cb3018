"""Turns a posted request into a job: its body, its checks, its video, its place, its record.

The order is the contract: a client that cannot be served is refused before the body is read, errors
in fields or video are reported before the answer's headers are sent, and a client that is still
sending holds no place.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import Request

from app.api.compressions import Compressions
from app.api.connection.drain import Drain
from app.api.connection.streams import StreamSlot
from app.api.post.cancelling import Cancellations
from app.api.post.chat_intake import Intake, TakenIn
from app.api.post.intake import check_content_type, check_idempotency_key
from app.api.post.job_request import (
    check_prompt,
    idempotency_hash,
    make_idempotency,
    make_job_request,
    min_visual_tokens,
    predict_use,
)
from app.api.post.places import Admitted, Place, admit
from app.api.post.reading import FrameReading, Reading
from app.api.post.uploads import Uploads
from app.api.post.wanted_frames import FoundFrames, WantedFrames, check_wanted, frame_spec
from app.api.schemas import ChatFields
from app.errors import (
    DeadlineUnreachableError,
    FrameStoreFullError,
    KeyLimitError,
    StoreUnavailableError,
    TryLaterError,
)
from app.keys.access import limits_of
from app.keys.entries import Principal, cache_salt
from app.keys.limits import KeyLimits, LimitState
from app.messages import JobRequest, JobState, ModelCard
from app.metrics import ApiMetrics
from app.settings import Settings
from app.store.event_log import LoggedEvent
from app.store.frame_store import parse_header
from app.store.job_queue import Created, Idempotency, JobQueue, JobRecord, NeededFrames
from app.store.owner_limits import Allowance, num_places
from app.tracing import Tracing
from dycoke_core.auto import Compression
from dycoke_core.config import CompressionConfig

logger = logging.getLogger(__name__)

STORE_LIMIT_S = 5.0  # time allowed to accept or refuse
MIN_READ_TIMEOUT_S = 1.0  # time left for reading after a slow probe

_NO_COMPRESSION = CompressionConfig(policy="full")  # for a job without a video


@dataclass(frozen=True, slots=True)
class PostedJob:
    """Args:
    is_new: False: an earlier job with the same idempotency key answers the request.
    has_key: a later request may find the job by its idempotency key.
    opening: the first event of a new job.
    limit_states: what the key has left of its limits now; empty for an earlier job.
    """

    record: JobRecord
    fields: ChatFields
    is_new: bool
    has_key: bool
    opening: LoggedEvent | None = None
    limit_states: tuple[LimitState, ...] = ()


class Submissions:
    def __init__(
        self,
        settings: Settings,
        compressions: Compressions,
        drain: Drain,
        queue: JobQueue,
        uploads: Uploads,
        reading: FrameReading,
        cancellations: Cancellations,
        tracing: Tracing,
        metrics: ApiMetrics,
    ) -> None:
        self._metrics = metrics
        self._settings = settings
        self._compressions = compressions
        self._drain = drain
        self._queue = queue
        self._uploads = uploads
        self._reading = reading
        self._cancellations = cancellations
        self._tracing = tracing
        self._found = FoundFrames()

    async def take(
        self,
        request: Request,
        principal: Principal,
        idempotency_key: str | None,
        traceparent: str | None,
        intake: Intake,
        answer: StreamSlot,
    ) -> PostedJob:
        """Accepts a request and starts reading its video.

        Args:
            principal: the caller; idempotency keys of two callers never collide.
            traceparent: the span that the job belongs to.
            intake: reads the body.
            answer: is opened before there is a job, and stays the caller's.

        Raises:
            DycokeError: the request is refused, and nothing of it is left.
            ClientLeftError
        """
        try:
            return await self._take(
                request, principal, idempotency_key, traceparent, intake, answer
            )
        except KeyLimitError as error:
            for state in error.violated:
                self._metrics.count_key_refusal(principal.name, state.name)
            raise

    async def _take(
        self,
        request: Request,
        principal: Principal,
        idempotency_key: str | None,
        traceparent: str | None,
        intake: Intake,
        answer: StreamSlot,
    ) -> PostedJob:
        accepted_at_s = time.time()
        check_idempotency_key(idempotency_key)
        check_content_type(request, *intake.content_types)
        limits = limits_of(principal, self._settings)
        models = await self._enter(principal.owner, limits, idempotency_key)
        async with Admitted() as admitted:
            async with self._uploads.limited():
                taken = await intake(request, models, principal)
                admitted.hold(taken.lease)
            salt = cache_salt(principal.owner, are_caches_shared=self._settings.share_caches)
            wanted = _wanted_frames(taken, salt)
            compression = self._check_video(taken, wanted)
            with _naming_video(taken):
                answer.open()
                admitted.take(await self._place(taken, wanted, principal.owner))
            job = make_job_request(
                taken.fields,
                taken.card,
                compression,
                job_id=admitted.job_id,
                owner=principal.owner,
                limits=limits,
                cache_salt=salt,
                wanted=wanted,
                extras=taken.extras,
                accepted_at_s=accepted_at_s,
                timeout_s=self._settings.job_timeout_s,
                upload_s=taken.upload_s,
                probe_s=taken.probe_s,
                traceparent=traceparent,
            )
            idempotency = self._idempotency(idempotency_key, taken, job)
            allowance = predict_use(job, taken.card, limits)
            created = await self._create(job, idempotency, admitted, wanted, allowance)
            if created.job_id != job.job_id:
                await admitted.forsake()  # `create` has given the place up
                record = await self._queue.get(created.job_id)
                return PostedJob(record, taken.fields, is_new=False, has_key=True)
            self._tracing.record("receive", traceparent, start_s=accepted_at_s)
            if created.is_queued:
                await admitted.forsake()
                logger.info("job queued", extra=job.log_fields)
            else:
                self._start_reading(admitted, job, taken, wanted, created.found)
        return PostedJob(
            _new_record(job, is_queued=created.is_queued),
            taken.fields,
            is_new=True,
            has_key=idempotency is not None,
            opening=created.opening,
            limit_states=created.limit_states,
        )

    async def wait_until_none(self) -> None:
        """Waits until no job's frames are being read."""
        await self._reading.wait_until_none()

    async def _enter(
        self, owner: str, limits: KeyLimits, idempotency_key: str | None
    ) -> dict[str, ModelCard]:
        """Refuses the request at its headers if there is no worker or no room."""
        self._drain.check()
        try:
            async with asyncio.timeout(STORE_LIMIT_S):
                return await admit(
                    self._queue,
                    max_jobs=self._settings.max_queued_jobs,
                    owner=owner,
                    limits=limits,
                    key_hash=idempotency_hash(owner, idempotency_key) if idempotency_key else "",
                )
        except TimeoutError:
            raise StoreUnavailableError from None

    async def _place(self, taken: TakenIn, wanted: WantedFrames | None, owner: str) -> Place:
        """Takes a place. There was room at the headers, but there may be none by now."""
        max_jobs = self._settings.max_queued_jobs
        frames = wanted.spec.num_frames if wanted is not None else 0
        wants = num_places(frames=frames, max_tokens=taken.fields.max_tokens)
        return await Place.reserve(
            self._queue,
            taken.card.model,
            f"job_{uuid.uuid4().hex}",
            owner=owner,
            num_places=min(wants, max_jobs),
            max_jobs=max_jobs,
            lease_s=self._settings.lease_s,
        )

    def _check_video(self, taken: TakenIn, wanted: WantedFrames | None) -> Compression:
        """Refuses what the video does not allow; returns its compression."""
        if wanted is None:
            return _NO_COMPRESSION
        check_wanted(taken.fields, wanted, max_bytes=self._settings.max_frame_store_bytes)
        compression = self._compressions.parse(taken.fields.compression)
        probe = wanted.video.video.probe
        num_visual_tokens = min_visual_tokens(wanted.spec, probe, taken.card, compression)
        check_prompt(taken.fields, taken.card, num_visual_tokens)
        return compression

    def _idempotency(self, key: str | None, taken: TakenIn, job: JobRequest) -> Idempotency | None:
        if key is None:
            return None
        ttl_s = self._settings.job_timeout_s + self._settings.result_ttl_s
        return make_idempotency(
            key, job.owner, taken.fields, job.video_id, taken.extras, ttl_s=ttl_s
        )

    async def _create(
        self,
        job: JobRequest,
        idempotency: Idempotency | None,
        admitted: Admitted,
        wanted: WantedFrames | None,
        allowance: Allowance,
    ) -> Created:
        """Raises: KeyLimitError, DeadlineUnreachableError, FrameStoreFullError: they name the
        video; the place is given up with `admitted`.
        """
        needed, expected = None, None
        if wanted is not None:
            max_bytes = self._settings.max_frame_store_bytes
            needed = NeededFrames(wanted.digest, wanted.max_bytes, max_bytes)
            expected = self._found.expected(job, wanted.spec, wanted.digest)
        try:
            created = await self._queue.create(
                job, idempotency=idempotency, frames=needed, expected=expected, allowance=allowance
            )
        except (KeyLimitError, DeadlineUnreachableError, FrameStoreFullError) as error:
            error.video_id = job.video_id
            raise
        except StoreUnavailableError as error:
            # It may exist despite the error, and a retry may have found it by its key.
            await admitted.forsake()
            self._cancellations.retract(job, error)
            raise
        if created.found and needed is not None:
            self._found.note(needed.digest, created.found)
        return created

    def _start_reading(
        self,
        admitted: Admitted,
        job: JobRequest,
        taken: TakenIn,
        wanted: WantedFrames | None,
        found: bytes,
    ) -> None:
        """Args:
        found: the stored frames' header, without pixels.
        """
        limit_s = self._settings.read_timeout_s
        self._reading.start(
            Reading(
                request=job,
                wanted=wanted,
                place=admitted.hand_over(),
                found=parse_header(found) if found else None,
                read_timeout_s=max(limit_s - taken.probe_s, MIN_READ_TIMEOUT_S),
            )
        )


@contextmanager
def _naming_video(taken: TakenIn) -> Iterator[None]:
    """Adds the video's id to refusals, so that the client need not send it again."""
    try:
        yield
    except TryLaterError as error:
        if taken.lease is not None:
            error.video_id = taken.lease.video.video_id
        raise


def _wanted_frames(taken: TakenIn, cache_salt: str) -> WantedFrames | None:
    """None for a question without a video."""
    if taken.lease is None:
        return None
    spec = frame_spec(taken.fields, taken.card)
    return WantedFrames.of(spec, taken.lease, cache_salt=cache_salt)


def _new_record(job: JobRequest, *, is_queued: bool) -> JobRecord:
    return JobRecord(
        job_id=job.job_id,
        model=job.model,
        state=JobState.QUEUED if is_queued else JobState.READING,
        attempts=0,
        accepted_at_s=job.accepted_at_s,
        queued_at_s=time.time() if is_queued else None,
        started_at_s=None,
        ended_at_s=None,
        request=job,
        position=None,
    )
