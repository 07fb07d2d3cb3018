"""What the routes work with, built once per process, and the caller's identity."""

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Request, Security
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from app.api.answer.answers import Answers
from app.api.answer.frame_images import FrameImages
from app.api.answer.jobs import Jobs
from app.api.auth import ApiKeys
from app.api.compressions import Compressions
from app.api.connection.drain import Drain
from app.api.connection.streams import StreamSlots
from app.api.openai.intake import CompletionIntake
from app.api.post.cancelling import Cancellations
from app.api.post.chat_intake import ChatIntake
from app.api.post.fair_budget import FairBudget
from app.api.post.submissions import Submissions
from app.api.post.uploads import Uploads
from app.api.signed_links import SIGNATURE, SignedLinks
from app.api.upkeep.metrics_page import MetricsPage
from app.keys.entries import Principal, Scope
from app.metrics import ApiMetrics
from app.store.kept_sets import KeptSets
from app.store.usage import UsageLog
from app.store.worker_registry import WorkerRegistry
from app.tracing import Tracing
from app.video_store import VideoStore


@dataclass(frozen=True, slots=True)
class Api:
    """What the routes need, by stage; a stage keeps its own collaborators to itself."""

    keys: ApiKeys
    links: SignedLinks
    public_docs: bool
    public_metrics: bool
    drain: Drain
    streams: StreamSlots
    registry: WorkerRegistry
    videos: VideoStore
    listings: FairBudget  # of stored videos, one at a time
    frame_images: FrameImages
    compressions: Compressions
    chat_intake: ChatIntake
    completion_intake: Callable[[], CompletionIntake]
    uploads: Uploads
    submissions: Submissions
    cancellations: Cancellations
    jobs: Jobs
    kept_sets: KeptSets
    answers: Answers
    usage: UsageLog
    metrics: ApiMetrics
    metrics_page: MetricsPage
    tracing: Tracing

    async def wait_until_idle(self) -> None:
        """Waits for what is under way: answers, the reading of frames, cancellations."""
        await self.streams.wait_until_none()
        await self.submissions.wait_until_none()
        await self.cancellations.wait_until_none()


# FastAPI runs plain functions in a thread each, so those that it calls are coroutines.


async def get_api(request: Request) -> Api:
    return cast(Api, request.app.state.api)


ApiDep = Annotated[Api, Depends(get_api)]


_bearer = HTTPBearer(auto_error=False, description="Where the server has API keys.")


async def get_principal(
    request: Request, api: ApiDep, _: Annotated[object, Security(_bearer)]
) -> Principal:
    """The caller. Raises: UnauthorizedError, KeysUnavailableError."""
    return api.keys.principal(request.headers.get("authorization"))


PrincipalDep = Annotated[Principal, Depends(get_principal)]


async def get_media_reader(
    request: Request, api: ApiDep, bearer: Annotated[object, Security(_bearer)]
) -> Principal:
    """The caller, by a key or by a signed link.

    Raises: UnauthorizedError, KeysUnavailableError, StoreUnavailableError.
    """
    if not api.keys.has_any or SIGNATURE not in request.query_params:
        return await get_principal(request, api, bearer)
    target = request.scope["raw_path"] + b"?" + request.scope["query_string"]
    return await api.links.principal(target.decode("latin-1"))


MediaReaderDep = Annotated[Principal, Depends(get_media_reader)]


def _with_scope(scope: Scope) -> Callable[[Principal], Awaitable[Principal]]:
    async def get_scoped(principal: PrincipalDep) -> Principal:
        principal.require(scope)
        return principal

    return get_scoped


# Each raises ForbiddenError too.
AskerDep = Annotated[Principal, Depends(_with_scope(Scope.ASK))]
AdminDep = Annotated[Principal, Depends(_with_scope(Scope.ADMIN))]
UploaderDep = Annotated[Principal, Depends(_with_scope(Scope.UPLOAD))]


async def may_see_docs(
    request: Request, api: ApiDep, bearer: Annotated[object, Security(_bearer)]
) -> None:
    """Raises: UnauthorizedError, KeysUnavailableError."""
    if not api.public_docs:
        await get_principal(request, api, bearer)


async def may_see_metrics(
    request: Request, api: ApiDep, bearer: Annotated[object, Security(_bearer)]
) -> None:
    """Raises: UnauthorizedError, ForbiddenError, KeysUnavailableError."""
    if not api.public_metrics:
        (await get_principal(request, api, bearer)).require(Scope.METRICS)


class AskingRoute(APIRoute):
    """Of a post that asks a question: calls its endpoint with (request, api, principal, idempotency
    key).

    FastAPI finds the same by the endpoint's signature, for several times the cost, which here would
    be a good part of a request's. Documents still go by the signature.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[..., Coroutine[Any, Any, Response]] = self.endpoint

        async def handle(request: Request) -> Response:
            api = await get_api(request)
            principal = await get_principal(request, api, None)
            principal.require(Scope.ASK)
            return await endpoint(request, api, principal, request.headers.get("idempotency-key"))

        return handle
