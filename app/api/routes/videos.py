"""Videos by id: uploading one ahead of its questions, looking it up, deleting it."""

import time
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response

from app.api.answer.frame_images import FrameImage
from app.api.answer.video_content import VideoContent
from app.api.context import ApiDep, MediaReaderDep, PrincipalDep, UploaderDep
from app.api.errors import NO_SUCH_FIELD, InvalidFieldsError
from app.api.openapi import (
    PROBLEMS,
    RANGE_PARAMETER,
    UPLOAD_REQUEST_BODY,
    VIDEO_CONTENT_RESPONSES,
)
from app.api.post.expiry import take_expiry
from app.api.post.intake import VIDEO_FIELD
from app.api.routes.uploading import take_upload
from app.api.schemas import VideoResource
from app.errors import IsFrameListError, VideoNotFoundError
from app.video_store import Retention
from dycoke_core.video import Container

router = APIRouter(tags=["videos"], responses=PROBLEMS)


@router.post(
    "/v1/videos",
    status_code=201,
    summary="Upload a video; the same content has the same id",
    openapi_extra={"requestBody": UPLOAD_REQUEST_BODY},
)
async def upload_video(request: Request, api: ApiDep, principal: UploaderDep) -> VideoResource:
    return VideoResource.of(
        await take_upload(
            request, api, principal, file_field=VIDEO_FIELD, parse_retention=_retention
        )
    )


@router.get(
    "/v1/videos/{video_id}/content",
    summary="A stored video's bytes, whole or by Range",
    response_class=Response,
    responses=VIDEO_CONTENT_RESPONSES,
    openapi_extra=RANGE_PARAMETER,
)
async def get_content(
    video_id: str, request: Request, api: ApiDep, principal: MediaReaderDep
) -> Response:
    """A list of frames has no file: it gives 409."""
    slot = api.streams.take(request, principal.owner)
    try:
        lease = await api.videos.lease(video_id, principal.owner)
        if lease.video.probe.container == Container.FRAMES:
            lease.release()
            raise IsFrameListError(
                "this is a list of frames, which has no video file; "
                "GET /v1/videos/{video_id}/frames/{index} has what a job saw of it"
            )
    except BaseException:
        slot.release()
        raise
    return VideoContent(lease, slot)


@router.get("/v1/videos/{video_id}", summary="What is known of a stored video")
async def get_video(video_id: str, api: ApiDep, principal: PrincipalDep) -> VideoResource:
    return VideoResource.of(await api.videos.find(video_id, principal.owner))


@router.get(
    "/v1/videos/{video_id}/frames/{index}",
    summary="The pixels of a frame that the model saw in a job, as PNG",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}},
)
async def get_frame(
    video_id: str,
    index: Annotated[int, Path(ge=0, description="Among the frames of the job's receipt.")],
    job_id: Annotated[str, Query(description="A job about this video.")],
    request: Request,
    api: ApiDep,
    principal: MediaReaderDep,
) -> Response:
    """As long as the job is known and its frames are kept; asking again brings them back."""
    slot = api.streams.take(request, principal.owner)
    try:
        await api.videos.find(video_id, principal.owner)
        frames = await api.jobs.frames(job_id, video_id, principal.owner)
        if index >= frames.num_frames:
            raise InvalidFieldsError.of(
                "index", f"must be less than the job's {frames.num_frames} frames"
            )
        png = await api.frame_images.png(frames.digest, index, principal.owner)
        if png is None:
            raise VideoNotFoundError(
                "the job's frames are no longer kept: ask about the video again"
            )
    except BaseException:
        slot.release()
        raise
    return FrameImage(
        png,
        slot,
        headers={
            "X-Frame-Index": str(frames.indices[index]),
            "X-Frame-Timestamp-S": str(frames.timestamps_s[index]),
        },
    )


@router.delete("/v1/videos/{video_id}", status_code=204, summary="Delete a stored video")
async def delete_video(video_id: str, api: ApiDep, principal: UploaderDep) -> Response:
    """It is gone at once. A job about it continues, and keeps what it needs until it ends."""
    await api.uploads.delete(video_id, principal.owner)
    return Response(status_code=204)


def _retention(fields: list[tuple[str, str]]) -> Retention:
    expires_at_s, others = take_expiry(fields, time.time())
    if others:
        raise InvalidFieldsError.of(others[0][0], NO_SUCH_FIELD)
    return Retention(expires_at_s)
