"""Every error the core raises on purpose.

    DycokeError
    ├── InvalidRequestError          a field has a value we do not take
    │   └── PromptTooLongError       prompt + answer exceed the model's positions
    ├── VideoError                   something is wrong with the video itself
    │   ├── UnsupportedContainerError
    │   ├── UnsupportedCodecError
    │   ├── NoVideoStreamError
    │   ├── UnreadableVideoError
    │   ├── VideoLimitError          pixels, frames, duration or bytes over the limit
    │   ├── VideoReadTimeoutError    the readers' time for one upload ran out
    │   └── VideoReaderKilledError   the reader ran out of memory or CPU time, or crashed
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
    code = "invalid_request"


class PromptTooLongError(InvalidRequestError):
    code = "prompt_too_long"


class VideoError(DycokeError):
    code = "video_error"


class UnsupportedContainerError(VideoError):
    code = "unsupported_container"


class UnsupportedCodecError(VideoError):
    code = "unsupported_codec"


class NoVideoStreamError(VideoError):
    code = "no_video_stream"


class UnreadableVideoError(VideoError):
    code = "unreadable_video"


class VideoLimitError(VideoError):
    code = "video_limit_exceeded"


class VideoReadTimeoutError(VideoError):
    code = "video_read_timeout"


class VideoReaderKilledError(VideoError):
    code = "video_reader_killed"


class SandboxUnavailableError(DycokeError):
    code = "sandbox_unavailable"


class ModelLoadError(DycokeError):
    code = "model_load_failed"


class EngineError(DycokeError):
    code = "engine_error"
    retryable = True


class OutOfMemoryError(EngineError):
    code = "out_of_memory"
