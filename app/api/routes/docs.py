"""The API's documentation: open if there are no keys, otherwise for key holders, or for all by a
setting.
"""

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse

from app.api.context import may_see_docs
from app.api.page.assets import DOCS, DOCS_CSP, html_headers

router = APIRouter(include_in_schema=False, dependencies=[Depends(may_see_docs)])


@router.get("/openapi.json")
async def openapi(request: Request) -> dict[str, Any]:
    document: dict[str, Any] = request.app.openapi()
    return document


@router.get("/docs")
async def docs() -> FileResponse:
    """Swagger UI, out of a package of this environment."""
    return FileResponse(DOCS, headers=html_headers(DOCS_CSP))
