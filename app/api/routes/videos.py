"""Videos by id: uploading one ahead of its questions, looking it up, deleting it."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api.connection.disconnect import unless_disconnected
from app.api.context import ApiDep, PrincipalDep, UploaderDep
from app.api.errors import FieldProblem, InvalidFieldsError
from app.api.openapi import PROBLEMS, UPLOAD_REQUEST_BODY
from app.api.post.intake import MULTIPART, VIDEO_FIELD, check_content_type, read_form
from app.api.schemas import VideoResource

router = APIRouter(tags=["videos"], responses=PROBLEMS)


@router.post(
    "/v1/videos",
    status_code=201,
    summary="Upload a video; the same content has the same id",
    openapi_extra={"requestBody": UPLOAD_REQUEST_BODY},
)
async def upload_video(request: Request, api: ApiDep, principal: UploaderDep) -> VideoResource:
    check_content_type(request, MULTIPART)
    api.drain.check()
    slot = api.streams.take()
    try:
        async with api.uploads.limited(), api.uploads.receive() as upload:
            form = await read_form(request, upload)
            if form.fields:
                raise _wrong(form.fields[0][0], "Extra inputs are not permitted")
            if not form.has_file:
                raise _wrong(VIDEO_FIELD, "Field required")
            lease, _probe_s = await unless_disconnected(
                request.receive, api.uploads.store(upload, principal.owner)
            )
    finally:
        slot.release()
    lease.release()
    return VideoResource.of(lease.video)


@router.get("/v1/videos/{video_id}", summary="What is known of a stored video")
async def get_video(video_id: str, api: ApiDep, principal: PrincipalDep) -> VideoResource:
    return VideoResource.of(await api.videos.find(video_id, principal.owner))


@router.delete("/v1/videos/{video_id}", status_code=204, summary="Delete a stored video")
async def delete_video(video_id: str, api: ApiDep, principal: UploaderDep) -> Response:
    """It is gone at once; a job about it goes on, and what that needs of it goes with the job."""
    await api.uploads.delete(video_id, principal.owner)
    return Response(status_code=204)


def _wrong(field: str, message: str) -> InvalidFieldsError:
    return InvalidFieldsError([FieldProblem(field=field, message=message)])
