"""Reads and checks the body of a post to `/v1/video/chat`, and stores or finds its video; and what
the intake of any surface returns.
"""

import time
from dataclasses import dataclass, replace
from typing import Protocol

from starlette.requests import Request

from app.api.compressions import Compressions
from app.api.connection.disconnect import unless_disconnected
from app.api.post.frames_by_rate import count_by_rate
from app.api.post.intake import (
    JSON,
    MULTIPART,
    content_type,
    read_form_fields,
    read_json_fields,
)
from app.api.post.job_request import NO_EXTRAS, Extras, check_fields
from app.api.post.uploads import Uploads
from app.api.schemas import ChatFields
from app.keys.entries import Principal, Scope
from app.messages import ModelCard
from app.settings import Settings
from app.video_store import VideoLease


@dataclass(frozen=True, slots=True)
class TakenIn:
    """A body that has been read and checked, and its video (None: a conversation without one)."""

    fields: ChatFields
    card: ModelCard
    lease: VideoLease | None
    upload_s: float
    probe_s: float
    extras: Extras = NO_EXTRAS


class Intake(Protocol):
    """How one surface's bodies are read."""

    content_types: tuple[str, ...]

    async def __call__(
        self, request: Request, models: dict[str, ModelCard], principal: Principal
    ) -> TakenIn:
        """Raises: DycokeError, ClientLeftError."""
        ...


class ChatIntake:
    content_types: tuple[str, ...] = (JSON, MULTIPART)

    def __init__(self, settings: Settings, compressions: Compressions, uploads: Uploads) -> None:
        self._settings = settings
        self._compressions = compressions
        self._uploads = uploads

    async def __call__(
        self, request: Request, models: dict[str, ModelCard], principal: Principal
    ) -> TakenIn:
        began_at, owner = time.monotonic(), principal.owner
        if content_type(request) == JSON:
            fields = (await read_json_fields(request)).with_defaults_within(self._settings)
            return await self._find_video(fields, self._check(fields, models), owner)
        async with self._uploads.receive(principal) as upload:
            fields, has_video = await read_form_fields(
                request, upload, on_file=lambda: principal.require(Scope.UPLOAD)
            )
            fields = fields.with_defaults_within(self._settings)
            card = self._check(fields, models)
            if not has_video:
                return await self._find_video(fields, card, owner)
            upload_s = time.monotonic() - began_at
            lease, probe_s = await unless_disconnected(
                request.receive, self._uploads.store(upload, principal)
            )
            return self._at_rate(TakenIn(fields, card, lease, upload_s, probe_s))

    async def _find_video(self, fields: ChatFields, card: ModelCard, owner: str) -> TakenIn:
        """As short as a look at the disk: a client that leaves meanwhile is noticed after it."""
        assert fields.video_id is not None
        lease = await self._uploads.find(fields.video_id, owner)
        return self._at_rate(TakenIn(fields, card, lease, upload_s=0.0, probe_s=0.0))

    def _at_rate(self, taken: TakenIn) -> TakenIn:
        """With the number of frames that `fps` yields from the video, if it is given. A failure to
        count them releases the lease."""
        fields, lease = taken.fields, taken.lease
        if fields.fps is None or lease is None:
            return taken
        try:
            num_frames, warnings = count_by_rate(
                fields.fps,
                lease.video.probe,
                taken.card,
                clip=(fields.start_s, fields.end_s),
                num_frames=fields.most_frames,
                most=fields.most_frames or self._settings.max_frames,
            )
        except BaseException:
            lease.release()
            raise
        fields = fields.model_copy(update={"num_frames": num_frames})
        return replace(taken, fields=fields, extras=Extras(warnings=tuple(warnings)))

    def _check(self, fields: ChatFields, models: dict[str, ModelCard]) -> ModelCard:
        return check_fields(fields, models, self._settings, self._compressions)
