"""Signed links to a video and to its frames."""

from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel

from app.api.context import ApiDep, PrincipalDep
from app.api.openapi import PROBLEMS

router = APIRouter(tags=["videos"], responses=PROBLEMS)


class MediaLinks(BaseModel):
    """Paths on this service. Where it has keys each is good for ten minutes, with no header."""

    content: str
    frames: list[str]  # that the model saw in the job, in order; empty without one


@router.get("/v1/videos/{video_id}/links", summary="Links to a video that need no header")
async def get_links(
    video_id: str,
    response: Response,
    api: ApiDep,
    principal: PrincipalDep,
    job_id: Annotated[str | None, Query(description="A job about this video.")] = None,
) -> MediaLinks:
    await api.videos.find(video_id, principal.owner)
    paths = [f"/v1/videos/{video_id}/content"]
    if job_id is not None:
        frames = await api.jobs.frames(job_id, video_id, principal.owner)
        frame = f"/v1/videos/{video_id}/frames/{{}}?job_id={job_id}"
        paths += map(frame.format, range(frames.num_frames))
    content, *others = await api.links.sign(paths, principal)
    response.headers["Cache-Control"] = "no-store"
    return MediaLinks(content=content, frames=others)
