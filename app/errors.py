"""Errors of the service, in addition to the core's own tree (`dycoke_core.errors`).

    DycokeError
    └── ServiceError
        ├── UnauthorizedError, ForbiddenError, HostNotAllowedError, OriginNotAllowedError
        ├── KeysUnavailableError         the file of keys cannot be read
        ├── JobNotFoundError, VideoNotFoundError, ModelNotFoundError
        ├── KeptSetsNotFoundError, KeptSetDroppedError, JobNotDoneError
        ├── IsFrameListError, RangeNotSatisfiableError
        ├── UnsupportedMediaTypeError, UploadTooLargeError, UploadTimeoutError,
        │   TooManyUploadsError
        ├── IdempotencyConflictError
        ├── TryLaterError                carries retry_after_s, video_id
        │   ├── QueueFullError
        │   ├── KeyLimitError            with what it has left
        │   ├── DeadlineUnreachableError
        │   ├── FrameStoreFullError
        │   └── TooManyStreamsError
        ├── VideoStoreFullError
        ├── NoWorkerError, ShuttingDownError, StoreUnavailableError
        ├── DeadlineExceededError, ReaderLostError, JobLostError, JobCancelledError
        ├── SamplerChangedError          an upgrade in mid-answer
        ├── WorkersLostError             worker after worker went, by no known fault of the job
        └── JobFailedRepeatedlyError     the job was alone with two workers that died

Which HTTP status a code gets is known to `app.api.errors` alone.
"""

from typing import Self

from app.keys.limits import LimitState
from dycoke_core.errors import DycokeError


class ServiceError(DycokeError):
    pass


class UnauthorizedError(ServiceError):
    """The API key is missing or wrong."""

    code = "unauthorized"


class ForbiddenError(ServiceError):
    """The key is good, but not for this."""

    code = "forbidden"


class HostNotAllowedError(ServiceError):
    """The request is for a name that this service does not go by."""

    code = "host_not_allowed"


class OriginNotAllowedError(ServiceError):
    """A page of another site has sent the request."""

    code = "origin_not_allowed"


class KeysUnavailableError(ServiceError):
    """The stored keys could not be read for too long to go by what they were."""

    code = "keys_unavailable"
    retryable = True


class JobNotFoundError(ServiceError):
    """There is no such job, or it belongs to another key, or it ended too long ago."""

    code = "job_not_found"

    def __init__(
        self,
        message: str = "no job of yours has this id, or its result is gone "
        "(DYCOKE_RESULT_TTL_S after the job's end): post the request again",
    ) -> None:
        super().__init__(message)


class VideoNotFoundError(ServiceError):
    """There is no such video, it belongs to another key, or it was evicted: upload it again."""

    code = "video_not_found"

    def __init__(
        self,
        message: str = "no video of yours has this id: it may have expired, been deleted or been "
        "evicted; upload it again with POST /v1/videos",
    ) -> None:
        super().__init__(message)


class ModelNotFoundError(ServiceError):
    """No worker serves a model of that name."""

    code = "model_not_found"


class UnsupportedMediaTypeError(ServiceError):
    """The body is neither JSON nor a form, or not what the route takes."""

    code = "unsupported_media_type"


class UploadTooLargeError(ServiceError):
    """The video is larger than `MAX_UPLOAD_BYTES`."""

    code = "upload_too_large"

    @classmethod
    def of_video(cls, max_bytes: int) -> Self:
        return cls(f"the video is larger than {max_bytes} bytes (DYCOKE_MAX_UPLOAD_BYTES)")


class TooManyUploadsError(ServiceError):
    """This client, or all clients together, send as many requests, or as much, as they may at a
    time."""

    code = "too_many_uploads"
    retryable = True


class UploadTimeoutError(ServiceError):
    """The client sent its body too slowly, or nothing for too long."""

    code = "upload_timeout"
    retryable = True


class IdempotencyConflictError(ServiceError):
    """The idempotency key was used for another request."""

    code = "idempotency_conflict"


class VideoStoreFullError(ServiceError):
    """No room for an upload, and every stored video is in use."""

    code = "video_store_full"
    retryable = True


class TryLaterError(ServiceError):
    """There is no room for the request just now."""

    retryable = True

    def __init__(self, message: str, *, retry_after_s: int, video_id: str | None = None) -> None:
        """Args:
        video_id: of the request's video, which is stored: a retry need not upload it.
        """
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.video_id = video_id


class TooManyStreamsError(TryLaterError):
    """This client, or all clients together, have as many open answers as they may."""

    code = "too_many_streams"


class QueueFullError(TryLaterError):
    """As many jobs are under way as may be; `Retry-After` says when to try again."""

    code = "queue_full"


class KeyLimitError(TryLaterError):
    """The API key has reached a limit of its own; `Retry-After` says when to try again."""

    code = "key_limit_exceeded"

    def __init__(
        self, message: str, *, retry_after_s: int, limit_states: tuple[LimitState, ...]
    ) -> None:
        """Args:
        limit_states: what the key has left of all its limits.
        """
        super().__init__(message, retry_after_s=retry_after_s)
        self.limit_states = limit_states

    @property
    def violated(self) -> tuple[LimitState, ...]:
        return tuple(state for state in self.limit_states if state.wait_s is not None)


class FrameStoreFullError(TryLaterError):
    """The frames of jobs under way take all the room that frames have; none were read."""

    code = "frame_store_full"

    def __init__(self, *, video_id: str | None = None) -> None:
        message = (
            "the frames of jobs under way take all the room there is for frames "
            "(DYCOKE_MAX_FRAME_STORE_BYTES): try again when some have ended"
        )
        super().__init__(message, retry_after_s=2, video_id=video_id)


class DeadlineUnreachableError(TryLaterError):
    """The request's `deadline_s` would pass before its first token: it is refused, or ended by the
    worker that takes it."""

    code = "deadline_unreachable"


class NoWorkerError(ServiceError):
    """No worker is alive to take the job."""

    code = "no_worker"
    retryable = True


class ShuttingDownError(ServiceError):
    """This API process is draining; another one, or the next one, answers."""

    code = "shutting_down"
    retryable = True

    def __init__(self) -> None:
        super().__init__("this server is shutting down: send the request again")


class StoreUnavailableError(ServiceError):
    """Redis, or the storage of videos, does not answer."""

    code = "store_unavailable"
    retryable = True

    def __init__(self, message: str = "the job store does not answer: try again") -> None:
        super().__init__(message)


class KeptSetsNotFoundError(ServiceError):
    """What the job kept is not known: it did not ask for `kept_mask`, has no video, or was not
    answered to its end."""

    code = "kept_not_found"


class KeptSetDroppedError(ServiceError):
    """What was kept at this token is not stored: what earlier ones kept took all the room."""

    code = "kept_truncated"


class IsFrameListError(ServiceError):
    """What was asked for is a list of frames, which no file of a video holds."""

    code = "is_frame_list"


class RangeNotSatisfiableError(ServiceError):
    """The `Range` header is malformed, or asks for nothing that the video has."""

    code = "range_not_satisfiable"


class JobNotDoneError(ServiceError):
    """The job has not ended yet, and what was asked for is known at its end."""

    code = "job_not_done"
    retryable = True


class DeadlineExceededError(ServiceError):
    """The job was not done within `JOB_TIMEOUT_S`, or within the request's `deadline_s`."""

    code = "deadline_exceeded"
    retryable = True

    def __init__(self, message: str = "the job's time limit has passed") -> None:
        super().__init__(message)


class ReaderLostError(ServiceError):
    """The API process that read the job's frames is gone."""

    code = "reader_lost"
    retryable = True

    def __init__(self) -> None:
        super().__init__("the process that was reading the video is gone: post the request again")


class JobLostError(ServiceError):
    """The job's record vanished while its answer was being read: Redis lost its data, or newer
    answers needed the room."""

    code = "job_lost"
    retryable = True


class SamplerChangedError(ServiceError):
    """Part of the answer was drawn by a release whose seeds give other tokens than this one's."""

    code = "sampler_changed"
    retryable = True


class JobCancelledError(ServiceError):
    """The job was cancelled, on request or because its client left."""

    code = "cancelled"


class WorkersLostError(ServiceError):
    """Worker after worker was lost with the job, which is not known to be to blame."""

    code = "workers_lost"
    retryable = True


class JobFailedRepeatedlyError(ServiceError):
    """Two workers died while they ran only this job."""

    code = "job_failed_repeatedly"


def error_codes() -> tuple[str, ...]:
    """Every code that an error of the service or the core may carry, sorted."""
    codes, classes = set(), [DycokeError]
    while classes:
        error_class = classes.pop()
        codes.add(error_class.code)
        classes += error_class.__subclasses__()
    return tuple(sorted(codes))
