"""`/v1/files`: the stored videos in OpenAI's form. A file's id is its video's."""

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel

from app.api.answer.video_content import file_name
from app.api.context import ApiDep, PrincipalDep, UploaderDep
from app.api.openai.fields import wrong
from app.api.openapi import (
    EXPIRES_AFTER,
    OPENAI_ERRORS,
    RANGE_PARAMETER,
    VIDEO_CONTENT_RESPONSES,
)
from app.api.post.expiry import take_expiry
from app.api.routes.uploading import take_upload
from app.api.routes.videos import get_content
from app.errors import VideoNotFoundError
from app.video_store import Retention, StoredVideo

router = APIRouter(prefix="/v1/files", tags=["openai"], responses=OPENAI_ERRORS)

PURPOSES = ("user_data", "vision")
MAX_LIMIT = 10_000  # that a client may ask for
MAX_PAGE = 1_000  # that it gets; clients ask for the rest, as the list says that there is more

_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": list(PURPOSES)},
                    "expires_after": EXPIRES_AFTER,
                },
                "required": ["file", "purpose"],
            }
        }
    },
}


class FileResource(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int  # Unix time
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, video: StoredVideo) -> "FileResource":
        expires_at_s = video.retention.expires_at_s
        return cls(
            id=video.video_id,
            bytes=video.num_bytes,
            created_at=int(video.created_at_s),
            expires_at=None if expires_at_s is None else int(expires_at_s),
            filename=file_name(video),
            purpose=video.retention.purpose,
        )


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileResource]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


@router.post("", summary="Upload a video as a file", openapi_extra={"requestBody": _BODY})
async def create_file(request: Request, api: ApiDep, principal: UploaderDep) -> FileResource:
    return FileResource.of(
        await take_upload(request, api, principal, file_field="file", parse_retention=_retention)
    )


@router.get("", summary="All files of this key")
async def list_files(
    api: ApiDep,
    principal: PrincipalDep,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = MAX_LIMIT,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
) -> FileList:
    try:
        async with api.listings.taken(1, principal.owner):
            videos, has_more = await api.videos.page(
                principal.owner,
                limit=min(limit, MAX_PAGE),
                purpose=purpose,
                after=after,
                newest_first=order == "desc",
            )
    except VideoNotFoundError:
        raise wrong("after", "no such file") from None
    page = [FileResource.of(video) for video in videos]
    return FileList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=has_more,
    )


@router.get("/{file_id}", summary="What is known of a file")
async def get_file(file_id: str, api: ApiDep, principal: PrincipalDep) -> FileResource:
    return FileResource.of(await api.videos.find(file_id, principal.owner))


@router.get(
    "/{file_id}/content",
    summary="A file's bytes, whole or by Range",
    response_class=Response,
    responses=VIDEO_CONTENT_RESPONSES,
    openapi_extra=RANGE_PARAMETER,
)
async def get_file_content(
    file_id: str, request: Request, api: ApiDep, principal: PrincipalDep
) -> Response:
    return await get_content(file_id, request, api, principal)


@router.delete("/{file_id}", summary="Delete a file")
async def delete_file(file_id: str, api: ApiDep, principal: UploaderDep) -> DeletedFile:
    """It is gone at once. A job about it continues, and keeps what it needs until it ends."""
    await api.uploads.delete(file_id, principal.owner)
    return DeletedFile(id=file_id)


def _retention(fields: list[tuple[str, str]]) -> Retention:
    expires_at_s, others = take_expiry(fields, time.time())
    said = dict(others)
    if said.get("purpose") not in PURPOSES:
        raise wrong("purpose", f"must be {' or '.join(PURPOSES)}")
    return Retention(expires_at_s, said["purpose"])
