"""Reads and checks a chat completion's body, and finds its video. See `chat_intake.Intake`."""

import time
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from app.api.compressions import Compressions
from app.api.connection.disconnect import unless_disconnected
from app.api.openai.fetching import MediaFetcher
from app.api.openai.fields import MAX_WARNINGS, CompletionFields, parse_fields, wrong
from app.api.openai.media import BodyMedia, MediaFinder
from app.api.openai.messages import Conversation, VideoPart, parse_messages
from app.api.openai.rendering import StreamOptions
from app.api.openai.sampling import (
    ALIASES,
    count_frames,
    limit_pixels,
    parse_aliases,
    with_aliases,
)
from app.api.openai.streamed_json import StreamedJson, base64_size
from app.api.post.chat_intake import TakenIn
from app.api.post.frames_by_rate import DEFAULT_FRAMES
from app.api.post.intake import JSON, parse_object, read_body
from app.api.post.job_request import Extras, check_fields
from app.api.post.multipart import MAX_TEXT_BYTES
from app.api.post.uploads import Uploads
from app.api.schemas import ChatFields
from app.errors import VideoNotFoundError
from app.keys.entries import Principal
from app.messages import ModelCard
from app.settings import Settings
from app.store.video_aliases import VideoAliases
from app.video_store import VideoLease
from dycoke_core.errors import InvalidRequestError
from dycoke_core.video.frame_list import MAX_PICTURES

NO_VIDEO = "without effect on a conversation without a video"


class CompletionIntake:
    """Reads one body.

    Args:
        uploads: where videos come from.
        fetcher: gets those that a URL names.
        aliases: names of those that came before.
    """

    content_types: tuple[str, ...] = (JSON,)

    def __init__(
        self,
        settings: Settings,
        compressions: Compressions,
        uploads: Uploads,
        fetcher: MediaFetcher,
        aliases: VideoAliases,
    ) -> None:
        self._aliases = aliases
        self._finder = MediaFinder(uploads, fetcher)
        self._settings = settings
        self._compressions = compressions
        self._uploads = uploads
        self.options = StreamOptions()  # set by reading

    async def __call__(
        self, request: Request, models: dict[str, ModelCard], principal: Principal
    ) -> TakenIn:
        """Raises: DycokeError, ClientLeftError."""
        began_at = time.monotonic()
        async with AsyncExitStack() as stack:
            body = await self._read(request, principal, stack)
            has_medium = body.media.upload is not None or body.media.frames is not None
            upload_s = time.monotonic() - began_at if has_medium else 0.0
            return await self._take(request, principal, models, body, upload_s)

    async def _take(
        self,
        request: Request,
        principal: Principal,
        models: dict[str, ModelCard],
        body: "_Body",
        upload_s: float,
    ) -> TakenIn:
        fields, warnings = parse_fields(body.data)
        conversation = parse_messages(fields.messages)
        warnings += conversation.warnings
        self._set_options(fields, warnings)
        part = self._sampled(fields, conversation, warnings)
        chat = self._chat_fields(fields, conversation, part)
        card = check_fields(chat, models, self._settings, self._compressions)
        lease, probe_s = None, 0.0
        if part is not None:
            lease, probe_s = await self._find(request, part, body, principal)
            if body.media.is_list(part):
                part = replace(part, fps=None)  # which was the list's own
            try:
                chat = self._with_frames(chat, part, card, lease, warnings)
            except BaseException:
                lease.release()
                raise
        else:
            warnings += [
                f"{name}: {NO_VIDEO}"
                for name in ("compression", "kept_mask")
                if getattr(fields, name)
            ]
        extras = Extras(
            video_turn=part.turn if part is not None else None,
            ignore_eos=bool(fields.ignore_eos),
            warnings=_bounded(warnings),
            tells_prompt_tokens=self.options.continuous_usage,
        )
        return TakenIn(chat, card, lease, upload_s, probe_s, extras)

    async def _read(self, request: Request, principal: Principal, stack: AsyncExitStack) -> "_Body":
        """Reads the body; a medium in it goes to an upload, which ends with `stack`."""
        max_frames = min(self._settings.max_frames, MAX_PICTURES)
        media = BodyMedia(self._uploads, principal, stack, max_frames)
        scanner = StreamedJson(media.open_sink, max_text_bytes=MAX_TEXT_BYTES)
        max_bytes = MAX_TEXT_BYTES + base64_size(self._settings.max_upload_bytes)
        async with aclosing(read_body(request, max_bytes=max_bytes)) as chunks:
            async for chunk in chunks:
                await scanner.feed(chunk)
        return _Body(parse_object(scanner.text, is_as_sent=not scanner.num_media), media)

    def _set_options(self, fields: CompletionFields, warnings: list[str]) -> None:
        options = fields.stream_options
        if options is not None:
            has_usage, is_continuous = options.include_usage, options.continuous_usage_stats
            self.options = StreamOptions(bool(has_usage), bool(has_usage and is_continuous))
            if is_continuous and not has_usage:
                warnings.append("stream_options.continuous_usage_stats: needs include_usage")

    def _sampled(
        self, fields: CompletionFields, conversation: Conversation, warnings: list[str]
    ) -> VideoPart | None:
        aliases, alias_warnings = parse_aliases(fields.media_io_kwargs, fields.mm_processor_kwargs)
        warnings += alias_warnings
        if conversation.video is None:
            warnings += aliases.unused(ALIASES, NO_VIDEO)
            return None
        part, part_warnings = with_aliases(conversation.video, aliases, self._settings.max_frames)
        warnings += part_warnings
        if part.end_s is not None and part.end_s <= (part.start_s or 0.0):
            raise wrong(f"{part.param}.end_s", "must be after 'start_s'")
        return part

    def _chat_fields(
        self, fields: CompletionFields, conversation: Conversation, part: VideoPart | None
    ) -> ChatFields:
        """The same question in the form of `/v1/video/chat`."""
        said: dict[str, Any] = {
            "model": fields.model,
            "stream": bool(fields.stream),
            "max_tokens": self._max_tokens(fields),
            "temperature": fields.temperature,
            "top_p": fields.top_p,
            "seed": fields.seed,
            "stop": [fields.stop] if isinstance(fields.stop, str) else fields.stop,
            "compression": fields.compression,
            "on_disconnect": fields.on_disconnect,
            "kept_mask": fields.kept_mask,
            "priority": fields.priority,
            "deadline_s": fields.deadline_s,
            "num_frames": min(DEFAULT_FRAMES, self._settings.max_frames),
            "sampling": part.sampling if part is not None else None,
            "start_s": part.start_s if part is not None else None,
            "end_s": part.end_s if part is not None else None,
        }
        said = {name: value for name, value in said.items() if value is not None}
        chat = ChatFields(messages=conversation.turns, **said)
        chat = chat.with_defaults_within(self._settings)
        try:
            self._compressions.parse(chat.compression)
        except InvalidRequestError as error:
            raise wrong("compression", error.message) from None
        return chat

    def _max_tokens(self, fields: CompletionFields) -> int | None:
        """The newer name counts where both are given."""
        name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
        value: int | None = getattr(fields, name)
        if value is not None and value > self._settings.max_tokens:
            limit = self._settings.max_tokens
            raise wrong(name, f"Input should be less than or equal to {limit}")
        return value

    async def _find(
        self, request: Request, part: VideoPart, body: "_Body", principal: Principal
    ) -> tuple[VideoLease, float]:
        """Returns the video, and the seconds that its probe took."""
        owner = principal.owner
        if part.uuid is not None and not part.source and not part.frames:
            video_id = await self._aliases.find(owner, part.uuid)
            if video_id is None:
                raise VideoNotFoundError(
                    "no video was sent with this 'uuid' lately: send it with the video itself"
                )
            part = replace(part, source=video_id)
        finding = self._finder.find(part, body.media, principal)
        lease, probe_s = await unless_disconnected(request.receive, finding)
        if part.uuid is not None:
            try:
                await self._aliases.note(owner, part.uuid, lease.video.video_id)
            except BaseException:
                lease.release()
                raise
        return lease, probe_s

    def _with_frames(
        self,
        chat: ChatFields,
        part: VideoPart,
        card: ModelCard,
        lease: VideoLease,
        warnings: list[str],
    ) -> ChatFields:
        probe = lease.video.probe
        if part.start_s and probe.duration_s is not None and part.start_s >= probe.duration_s:
            raise wrong(
                f"{part.param}.start_s",
                f"must be before the video's end at {probe.duration_s:.3f} s",
            )
        num_frames, count_warnings = count_frames(part, probe, card, self._settings.max_frames)
        max_pixels, pixel_warnings = limit_pixels(part, card, self._settings.max_frame_pixels)
        warnings += count_warnings + pixel_warnings
        return chat.model_copy(
            update={"num_frames": num_frames, "fps": part.fps, "max_pixels": max_pixels}
        )


@dataclass(frozen=True, slots=True)
class _Body:
    """A body as it was read, and the media that were in it."""

    data: dict[str, Any]
    media: BodyMedia


def _bounded(warnings: list[str]) -> tuple[str, ...]:
    """At most as many as a receipt should hold."""
    if len(warnings) <= MAX_WARNINGS:
        return tuple(warnings)
    left = len(warnings) - MAX_WARNINGS + 1
    return (*warnings[: MAX_WARNINGS - 1], f"{left} more warnings")
