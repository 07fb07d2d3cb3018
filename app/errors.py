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
        │   ├── KeyLimitError            carries what the key has left
        │   ├── DeadlineUnreachableError
        │   ├── FrameStoreFullError
        │   └── TooManyStreamsError
        ├── VideoStoreFullError
        ├── NoWorkerError, ShuttingDownError, StoreUnavailableError
        ├── DeadlineExceededError, ReaderLostError, JobLostError, JobCancelledError
        ├── SamplerChangedError          an upgrade in mid-answer
        ├── WorkersLostError             too many workers were lost with the job
        └── JobFailedRepeatedlyError     the job was alone with two workers that died

Only `app.api.errors` knows which HTTP status a code gets.
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
    """The API key is valid, but does not allow this."""

    code = "forbidden"


class HostNotAllowedError(ServiceError):
    """The Host header names a host that this service does not answer for."""

    code = "host_not_allowed"


class OriginNotAllowedError(ServiceError):
    """The request comes from a page of another site."""

    code = "origin_not_allowed"


class KeysUnavailableError(ServiceError):
    """The file of stored keys has been unreadable for too long to trust its last content."""

    code = "keys_unavailable"
    retryable = True


class JobNotFoundError(ServiceError):
    """There is no such job, it belongs to another key, or it ended too long ago."""

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
    """No worker serves a model with this name."""

    code = "model_not_found"


class UnsupportedMediaTypeError(ServiceError):
    """The body is neither JSON nor a form, or not what this route takes."""

    code = "unsupported_media_type"


class UploadTooLargeError(ServiceError):
    """The video is larger than `MAX_UPLOAD_BYTES`."""

    code = "upload_too_large"

    @classmethod
    def of_video(cls, max_bytes: int) -> Self:
        return cls(f"the video is larger than {max_bytes} bytes (DYCOKE_MAX_UPLOAD_BYTES)")


class TooManyUploadsError(ServiceError):
    """This client, or all clients together, already send as many requests or bytes as they may."""

    code = "too_many_uploads"
    retryable = True


class UploadTimeoutError(ServiceError):
    """The client sent its body too slowly, or sent nothing for too long."""

    code = "upload_timeout"
    retryable = True


class IdempotencyConflictError(ServiceError):
    """The idempotency key was used for another request."""

    code = "idempotency_conflict"


class VideoStoreFullError(ServiceError):
    """There is no room for the upload, and every stored video is in use."""

    code = "video_store_full"
    retryable = True


class TryLaterError(ServiceError):
    """There is no room for the request at the moment."""

    retryable = True

    def __init__(self, message: str, *, retry_after_s: int, video_id: str | None = None) -> None:
        """Args:
        video_id: the request's video if it is stored, so that a retry need not upload it.
        """
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.video_id = video_id


class TooManyStreamsError(TryLaterError):
    """This client, or all clients together, already have as many open answers as they may."""

    code = "too_many_streams"


class QueueFullError(TryLaterError):
    """The queue has no place for the job; `Retry-After` says when to try again."""

    code = "queue_full"


class KeyLimitError(TryLaterError):
    """The API key has reached one of its limits; `Retry-After` says when to try again."""

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
    """The frames of jobs under way take all the room for frames; none of this job were read."""

    code = "frame_store_full"

    def __init__(self, *, video_id: str | None = None) -> None:
        message = (
            "the frames of jobs under way take all the room there is for frames "
            "(DYCOKE_MAX_FRAME_STORE_BYTES): try again when some have ended"
        )
        super().__init__(message, retry_after_s=2, video_id=video_id)


class DeadlineUnreachableError(TryLaterError):
    """The first token cannot come before the request's `deadline_s`: the API refuses the request,
    or the worker that takes it ends it."""

    code = "deadline_unreachable"


class NoWorkerError(ServiceError):
    """No worker is alive to take the job."""

    code = "no_worker"
    retryable = True


class ShuttingDownError(ServiceError):
    """This API process is shutting down: send the request again."""

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
    """Nobody knows which tokens the job kept: it did not ask for `kept_mask`, has no video, or did
    not finish its answer."""

    code = "kept_not_found"


class KeptSetDroppedError(ServiceError):
    """The kept set at this token is not stored: the sets of earlier tokens took all the room."""

    code = "kept_truncated"


class IsFrameListError(ServiceError):
    """The video is a list of frames, so it has no file to download."""

    code = "is_frame_list"


class RangeNotSatisfiableError(ServiceError):
    """The `Range` header is malformed, or asks for bytes that the video does not have."""

    code = "range_not_satisfiable"


class JobNotDoneError(ServiceError):
    """The job has not ended yet; try again when it has."""

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
    """The job's record disappeared while its answer was being read: Redis lost its data, or newer
    answers needed the room."""

    code = "job_lost"
    retryable = True


class SamplerChangedError(ServiceError):
    """A release whose seeds give other tokens than this one's has drawn part of the answer."""

    code = "sampler_changed"
    retryable = True


class JobCancelledError(ServiceError):
    """The job was cancelled, on request or because its client left."""

    code = "cancelled"


class WorkersLostError(ServiceError):
    """Too many workers were lost with the job, though it may not be to blame."""

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
