"""The route of the posts that ask a question."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from app.api.context import get_api, get_principal
from app.keys.entries import Scope


class AskingRoute(APIRoute):
    """Calls its endpoint with (request, api, principal, idempotency key).

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
