"""Whether the process is alive and can take a job, for everyone; and its metrics, for everyone
unless a setting says otherwise.
"""

import asyncio

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from app.api.context import ApiDep, may_see_metrics
from app.api.openapi import PROBLEMS
from app.api.post.places import served_models
from app.errors import StoreUnavailableError

router = APIRouter(tags=["health"])

READY_LIMIT_S = 2.0


@router.head("/livez", include_in_schema=False)
@router.get("/livez", summary="The process answers")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="A worker can take a job", responses=PROBLEMS)
async def readyz(api: ApiDep) -> dict[str, str]:
    api.drain.check()
    try:
        async with asyncio.timeout(READY_LIMIT_S):
            await served_models(api.registry)
    except TimeoutError:
        raise StoreUnavailableError from None
    return {"status": "ok"}


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **PROBLEMS},
    dependencies=[Depends(may_see_metrics)],
    openapi_extra={"security": [{}]},  # beside a key's: without one, unless settings want it
)
async def metrics(api: ApiDep) -> Response:
    """Of all processes on the port, each with its number as the label `process`."""
    return Response(await api.metrics_page.render(), media_type=CONTENT_TYPE_LATEST)
