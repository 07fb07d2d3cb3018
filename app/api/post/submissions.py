"""From a posted request to a job: its body, its checks, its video, its place, its record.

The order is the contract: a client that cannot be served is refused before the body is read, errors
in fields or video are reported before the answer's headers go out, and a client that is still
sending holds no place.
"""

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from starlette.requests import Request

from app.api.compressions import Compressions
from app.api.connection.disconnect import unless_disconnected
from app.api.connection.drain import Drain
from app.api.post.admission import Admitted, Place, admit
from app.api.post.cancelling import Cancellations
from app.api.post.frames_by_rate import count_by_rate
from app.api.post.intake import (
    JSON,
    MULTIPART,
    check_content_type,
    check_idempotency_key,
    read_form_fields,
    read_json_fields,
)
from app.api.post.job_request import (
    NO_EXTRAS,
    Extras,
    check_fields,
    make_idempotency,
    make_job_request,
    predict_use,
)
from app.api.post.prompt_size import check_prompt, min_visual_tokens
from app.api.post.reading import FrameReading, Reading
from app.api.post.uploads import Uploads
from app.api.post.wanted_frames import FoundFrames, WantedFrames, check_wanted, frame_spec
from app.api.schemas import ChatFields
from app.errors import (
    DeadlineUnreachableError,
    FrameStoreFullError,
    KeyLimitError,
    QueueFullError,
    StoreUnavailableError,
)
from app.keys.access import limits_of
from app.keys.entries import Principal, Scope, cache_salt
from app.keys.limits import NO_LIMITS, KeyLimits, Quota
from app.messages import JobRequest, JobState, ModelCard
from app.metrics import ApiMetrics
from app.settings import Settings
from app.store.event_log import LoggedEvent
from app.store.frame_store import parse_header
from app.store.job_queue import Created, Idempotency, JobQueue, JobRecord, NeededFrames
from app.store.owner_limits import Allowance
from app.tracing import Tracing
from app.video_store import VideoLease
from dycoke_core.auto import Compression
from dycoke_core.config import CompressionConfig

logger = logging.getLogger(__name__)

STORE_LIMIT_S = 5.0  # time allowed to accept or refuse
MIN_READ_TIMEOUT_S = 1.0  # left for reading after a slow probe

_NO_COMPRESSION = CompressionConfig(policy="full")  # of a job without a video


@dataclass(frozen=True, slots=True)
class PostedJob:
    """Args:
    is_new: False: an earlier job with the same idempotency key stands for the request.
    has_key: a later request may find the job by its idempotency key.
    opening: the first event of a new job.
    quotas: how the key stands to its limits now; of an earlier job: nothing.
    """

    record: JobRecord
    fields: ChatFields
    is_new: bool
    has_key: bool
    opening: LoggedEvent | None = None
    quotas: tuple[Quota, ...] = ()


@dataclass(frozen=True, slots=True)
class TakenIn:
    """A body that has been read and checked, and its video; None: a conversation without one."""

    fields: ChatFields
    card: ModelCard
    lease: VideoLease | None
    upload_s: float
    probe_s: float
    extras: Extras = NO_EXTRAS


class Intake(Protocol):
    """How one surface's bodies are read."""

    async def __call__(
        self, request: Request, models: dict[str, ModelCard], principal: Principal
    ) -> TakenIn: ...


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
        self.compressions = compressions
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
        traceparent: str | None = None,
        *,
        intake: Intake | None = None,
    ) -> PostedJob:
        """Takes a request in and starts reading its video.

        Args:
            principal: who asks; idempotency keys of two never meet.
            traceparent: the span that the job belongs to.
            intake: reads the body; None: that of `/v1/video/chat`.

        Raises:
            DycokeError: refused; nothing of the request is left.
            ClientLeftError
        """
        try:
            return await self._take(request, principal, idempotency_key, traceparent, intake)
        except KeyLimitError as error:
            for quota in error.violated:
                self._metrics.count_key_refusal(principal.name, quota.name)
            raise

    async def _take(
        self,
        request: Request,
        principal: Principal,
        idempotency_key: str | None,
        traceparent: str | None,
        intake: Intake | None,
    ) -> PostedJob:
        accepted_at_s = time.time()
        check_idempotency_key(idempotency_key)
        if intake is None:
            kind = check_content_type(request, JSON, MULTIPART)
            intake = partial(self._take_in, kind)
        limits = limits_of(principal, self._settings)
        # A retry finds its job, whatever its key has under way: `create` decides then.
        at_headers = limits if idempotency_key is None else NO_LIMITS
        models = await self._enter(principal.owner, at_headers)
        async with Admitted() as admitted:
            async with self._uploads.limited():
                taken = await intake(request, models, principal)
                admitted.hold(taken.lease)
            salt = cache_salt(principal.owner, are_caches_shared=self._settings.share_caches)
            wanted = _wanted_frames(taken, salt)
            compression = self._check_video(taken, wanted)
            admitted.take(await self._place(taken, principal.owner))
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
            quotas=created.quotas,
        )

    async def wait_until_none(self) -> None:
        """Waits until no job's frames are being read."""
        await self._reading.wait_until_none()

    async def _enter(self, owner: str, limits: KeyLimits) -> dict[str, ModelCard]:
        """Refuses at the headers where there is no worker or no room."""
        self._drain.check()
        try:
            async with asyncio.timeout(STORE_LIMIT_S):
                return await admit(
                    self._queue,
                    max_jobs=self._settings.max_queued_jobs,
                    owner=owner,
                    limits=limits,
                )
        except TimeoutError:
            raise StoreUnavailableError("the job store does not answer") from None

    async def _place(self, taken: TakenIn, owner: str) -> Place:
        """Takes a place, for which there was room at the headers and may be none by now."""
        try:
            return await Place.reserve(
                self._queue,
                taken.card.model,
                f"job_{uuid.uuid4().hex}",
                owner=owner,
                max_jobs=self._settings.max_queued_jobs,
                lease_s=self._settings.lease_s,
            )
        except QueueFullError as error:
            if taken.lease is not None:
                error.video_id = taken.lease.video.video_id
            raise

    async def _take_in(
        self, kind: str, request: Request, models: dict[str, ModelCard], principal: Principal
    ) -> TakenIn:
        """Reads and checks the body, then makes sure of the video."""
        began_at, owner = time.monotonic(), principal.owner
        if kind == JSON:
            fields = await read_json_fields(request)
            return await self._find_video(fields, self._check(fields, models), owner)
        async with self._uploads.receive() as upload:
            fields, has_video = await read_form_fields(
                request, upload, on_file=lambda: principal.require(Scope.UPLOAD)
            )
            card = self._check(fields, models)
            if not has_video:
                return await self._find_video(fields, card, owner)
            upload_s = time.monotonic() - began_at
            lease, probe_s = await unless_disconnected(
                request.receive, self._uploads.store(upload, principal)
            )
            return self._at_rate(TakenIn(fields, card, lease, upload_s, probe_s))

    async def _find_video(self, fields: ChatFields, card: ModelCard, owner: str) -> TakenIn:
        """As short as a look at the disk: a client that leaves meanwhile is noticed after it."""
        assert fields.video_id is not None
        lease = await self._uploads.find(fields.video_id, owner)
        return self._at_rate(TakenIn(fields, card, lease, upload_s=0.0, probe_s=0.0))

    def _at_rate(self, taken: TakenIn) -> TakenIn:
        """With the number of frames that `fps` makes of the video, if it is given."""
        fields, lease = taken.fields, taken.lease
        if fields.fps is None or lease is None:
            return taken
        max_frames = self._settings.max_frames
        num_frames, warnings = count_by_rate(
            fields.fps,
            lease.video.probe,
            taken.card,
            clip=(fields.start_s, fields.end_s),
            num_frames=fields.most_frames,
            most=fields.most_frames or max_frames,
        )
        fields = fields.model_copy(update={"num_frames": num_frames})
        return replace(taken, fields=fields, extras=Extras(warnings=tuple(warnings)))

    def _check(self, fields: ChatFields, models: dict[str, ModelCard]) -> ModelCard:
        return check_fields(fields, models, self._settings, self.compressions)

    def _check_video(self, taken: TakenIn, wanted: WantedFrames | None) -> Compression:
        """Refuses what the video does not allow; returns how it is compressed."""
        if wanted is None:
            return _NO_COMPRESSION
        check_wanted(taken.fields, wanted, max_bytes=self._settings.max_frame_store_bytes)
        compression = self.compressions.parse(taken.fields.compression)
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
        found: what is stored of the frames, before their pixels.
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
