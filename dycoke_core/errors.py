"""Every error the core raises on purpose.

    DycokeError
    ├── InvalidRequestError          a field has a value we do not take
    │   └── PromptTooLongError       prompt + answer exceed the model's positions
    ├── VideoError                   something is wrong with the video itself
    │   ├── UnsupportedContainerError
    │   ├── UnsupportedCodecError
    │   ├── NoVideoStreamError
    │   ├── UnreadableVideoError
    │   ├── UnreadableFrameError     one of a list of frames
    │   ├── VideoLimitError          pixels, frames, duration or bytes over the limit
    │   ├── VideoReadTimeoutError    the readers' time for one upload ran out
    │   ├── VideoReaderKilledError   the reader ran out of memory or CPU time, crashed, was killed
    │   └── VideoReaderFailedError   the reader ended in an exception: a bug, ours or a library's
    ├── ReadersUnavailableError      no reader could be started or kept alive
    ├── SandboxUnavailableError      this system cannot confine the reader
    ├── ModelLoadError
    └── EngineError                  the engine failed one sequence
        └── OutOfMemoryError

`code` is stable and public. The message is public too: it names fields and limits, never a path,
an address or another exception's text. `retryable` says whether the same request may succeed later.
"""

from typing import ClassVar


class DycokeError(Exception):
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequestError(DycokeError):
    """A field of the request is missing, wrong or out of range."""

    code = "invalid_request"


class PromptTooLongError(InvalidRequestError):
    """Prompt and answer do not fit into the model's context."""

    code = "prompt_too_long"


class VideoError(DycokeError):
    """The video cannot be used.

    `field` names the request's field with the video, once it is known.
    """

    code = "video_error"
    field: str | None = None


class UnsupportedContainerError(VideoError):
    """The file's container format is not supported."""

    code = "unsupported_container"

    def __init__(self) -> None:
        super().__init__(
            "the file is not in a container we take (MP4, MOV, Matroska, WebM, AVI, MPEG-TS)"
        )


class UnsupportedCodecError(VideoError):
    """The video's codec is not supported."""

    code = "unsupported_codec"


class NoVideoStreamError(VideoError):
    """The file has no video stream."""

    code = "no_video_stream"


class UnreadableVideoError(VideoError):
    """No reader could decode the video."""

    code = "unreadable_video"


class UnreadableFrameError(VideoError):
    """A frame of a list cannot be decoded, or has too many pixels."""

    code = "unreadable_frame"

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number  # in the list, from 0


class VideoLimitError(VideoError):
    """The video is too long, too large in pixels, or has too many frames."""

    code = "video_limit_exceeded"


class VideoReadTimeoutError(VideoError):
    """Reading the video took longer than `READ_TIMEOUT_S`."""

    code = "video_read_timeout"


class VideoReaderKilledError(VideoError):
    """The video's reader ran out of CPU time, or twice ran out of memory, crashed or was killed."""

    code = "video_reader_killed"

    def __init__(self, message: str, cause: str = "killed") -> None:
        """Args: cause: `memory`, `cpu`, `crash`; `killed`: from outside, as far as is known."""
        super().__init__(message)
        self.cause = cause


class VideoReaderFailedError(VideoError):
    """A reader of the video ended in an unexpected error: a bug, ours or a library's."""

    code = "video_reader_failed"


class ReadersUnavailableError(DycokeError):
    """No process could be started to read the video, or its readers were killed next to others."""

    code = "readers_unavailable"
    retryable = True


class SandboxUnavailableError(DycokeError):
    """The system cannot sandbox the frame readers."""

    code = "sandbox_unavailable"


class ModelLoadError(DycokeError):
    """The model could not be loaded."""

    code = "model_load_failed"


class EngineError(DycokeError):
    """The engine failed at this request."""

    code = "engine_error"
    retryable = True


class OutOfMemoryError(EngineError):
    """The engine ran out of memory at this request."""

    code = "out_of_memory"
