"""What the routes for uploading a video have in common."""

from collections.abc import Callable

from fastapi import Request

from app.api.connection.disconnect import unless_disconnected
from app.api.context import Api
from app.api.errors import InvalidFieldsError
from app.api.post.intake import MULTIPART, check_content_type, read_form
from app.keys.entries import Principal
from app.video_store import Retention, StoredVideo

Fields = list[tuple[str, str]]


async def take_upload(
    request: Request,
    api: Api,
    principal: Principal,
    *,
    file_field: str,
    parse_retention: Callable[[Fields], Retention],
) -> StoredVideo:
    """Receives, probes and stores the video of a form.

    Args:
        parse_retention: of the form's other fields; raises InvalidFieldsError.

    Raises:
        DycokeError
        ClientLeftError
    """
    check_content_type(request, MULTIPART)
    api.drain.check()
    slot = api.streams.take(request, principal.owner, is_upload=True)
    try:
        async with api.uploads.limited(), api.uploads.receive(principal) as upload:
            form = await read_form(request, upload, file_field=file_field)
            retention = parse_retention(form.fields)
            if not form.has_file:
                raise InvalidFieldsError.of(file_field, "Field required")
            lease, _ = await unless_disconnected(
                request.receive, api.uploads.store(upload, principal, retention)
            )
    finally:
        slot.release()
    lease.release()
    return lease.video
