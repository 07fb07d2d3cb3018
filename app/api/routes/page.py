"""The page on `/`. It and its files are open to everyone; it gets its data from the API."""

from fastapi import APIRouter
from fastapi.responses import FileResponse
from pydantic import BaseModel

from app.api.context import ApiDep
from app.api.page.assets import INDEX, PAGE_CSP, html_headers
from dycoke_core.tiny import CLIP

router = APIRouter(include_in_schema=False)

SAMPLE_PATH = "/sample.mp4"


@router.head("/")
@router.get("/")
async def page() -> FileResponse:
    return FileResponse(INDEX, headers=html_headers(PAGE_CSP))


class Access(BaseModel):
    needs_key: bool


@router.get("/page/access.json")
async def access(api: ApiDep) -> Access:
    """Whether the page must ask for a key before anything else."""
    return Access(needs_key=api.keys.has_any)


@router.get(SAMPLE_PATH)
async def sample() -> FileResponse:
    """The bundled clip, for those without one of their own."""
    return FileResponse(CLIP, media_type="video/mp4")
