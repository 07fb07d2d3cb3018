"""What the routes work with, built once per process, and who is asking."""

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer

from app.api.answer.observer import Followers
from app.api.auth import ApiKeys
from app.api.connection.drain import Drain
from app.api.connection.streams import StreamSlots
from app.api.post.cancelling import Cancellations
from app.api.post.reading import FrameReading
from app.metrics import ApiMetrics
from app.settings import Settings
from app.store.event_log import EventLog
from app.store.job_queue import JobQueue
from app.store.worker_registry import WorkerRegistry
from app.tracing import Tracing
from app.video_store import VideoStore
from dycoke_core.config import CompressionConfig
from dycoke_core.video import FrameReaders


@dataclass(frozen=True, slots=True)
class Api:
    settings: Settings
    default_compression: CompressionConfig
    keys: ApiKeys
    metrics: ApiMetrics
    drain: Drain
    streams: StreamSlots
    queue: JobQueue
    log: EventLog
    registry: WorkerRegistry
    videos: VideoStore
    readers: FrameReaders
    reading: FrameReading
    cancellations: Cancellations
    followers: Followers
    tracing: Tracing


def get_api(request: Request) -> Api:
    return cast(Api, request.app.state.api)


ApiDep = Annotated[Api, Depends(get_api)]


_bearer = HTTPBearer(auto_error=False, description="Where the server has API keys.")


def get_principal(request: Request, api: ApiDep, _: Annotated[object, Security(_bearer)]) -> str:
    """Raises: UnauthorizedError."""
    return api.keys.principal(request.headers.get("authorization"))


PrincipalDep = Annotated[str, Depends(get_principal)]
