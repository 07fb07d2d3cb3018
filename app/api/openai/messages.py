"""Parses a conversation as clients write it: turns of text, with at most one video among their
parts.

Takes the forms of OpenAI, vLLM, SGLang and DashScope: `video_url` as a part or bare, `video`,
`file`. Options for sampling the video are honoured on the part or inside it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from app.api.openai.fields import IS_NOT_SUPPORTED, unknown, wrong
from app.api.schemas import MAX_TEXT_CHARS, TurnField
from dycoke_core.video.types import Sampling

MAX_UUID_CHARS = 256

_ROLES: Mapping[str, Any] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_MESSAGE_FIELDS = ("role", "content", "name", "refusal", "audio", "tool_calls", "function_call")
_COUNTS = ("num_frames", "max_frames", "max_pixels")
SAMPLING_FIELDS = ("fps", *_COUNTS, "sampling", "start_s", "end_s")
_PART_FIELDS = ("type", "text", "video_url", "video", "file", "uuid", *SAMPLING_FIELDS)
_FILE_FIELDS = ("file_id", "file_data", "filename", "format")  # LiteLLM's name of a type
_VIDEO_FIELDS = ("url", "uuid", *SAMPLING_FIELDS)


@dataclass(frozen=True, slots=True)
class VideoPart:
    """The video of a conversation, as it was named.

    Args:
        source: an id or a URL; empty: what `uuid` names, or a list of frames.
        frames: of a list, each a URL.
        param: its place in the body, for errors about it.
        uuid: the client's own name of it.
        fps, num_frames, max_frames: as the part says; the first of them has been checked to be
            finite and above 0, the others to be at least 1, as has `max_pixels`.
    """

    source: str
    turn: int
    param: str
    frames: tuple[str, ...] = ()
    uuid: str | None = None
    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None
    max_pixels: int | None = None  # of each frame
    start_s: float | None = None
    end_s: float | None = None
    sampling: Sampling = "uniform"


@dataclass(slots=True)
class Conversation:
    turns: list[TurnField] = field(default_factory=list)
    video: VideoPart | None = None
    warnings: list[str] = field(default_factory=list)


def parse_messages(messages: list[dict[str, Any]]) -> Conversation:
    """Raises: InvalidFieldsError, naming the message or part that is wrong."""
    conversation = Conversation()
    for index, message in enumerate(messages):
        conversation.turns.append(_turn(message, index, conversation))
    if conversation.turns[-1].role != "user":
        raise wrong("messages", "the last message must be the user's")
    return conversation


def _turn(message: dict[str, Any], index: int, conversation: Conversation) -> TurnField:
    where = f"messages.{index}"
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", "must be system, developer, user or assistant")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise wrong(f"{where}.{name}", IS_NOT_SUPPORTED)
    _warn_of_unknown(message, _MESSAGE_FIELDS, where, conversation)
    texts = list(_texts(message.get("content"), f"{where}.content", index, conversation))
    if conversation.video is not None and conversation.video.turn == index and role != "user":
        raise wrong(conversation.video.param, "a video belongs to a user's message")
    text = "\n".join(texts)
    if not 1 <= len(text) <= MAX_TEXT_CHARS:
        raise wrong(f"{where}.content", f"needs 1 to {MAX_TEXT_CHARS} characters of text")
    return TurnField(role=_ROLES[role], content=text)


def _texts(content: Any, where: str, index: int, conversation: Conversation) -> Iterator[str]:
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, list):
        raise wrong(where, "must be text or a list of parts")
    for place, part in enumerate(content):
        at = f"{where}.{place}"
        if isinstance(part, str):
            yield part
            continue
        if not isinstance(part, dict):
            raise wrong(at, "must be an object")
        text = _part(part, at, index, conversation)
        if text is not None:
            yield text


def _part(part: dict[str, Any], at: str, index: int, conversation: Conversation) -> str | None:
    """The text of a part; None of a video, which goes into the conversation."""
    kind = part.get("type") or next((n for n in ("video_url", "video", "file") if n in part), None)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise wrong(f"{at}.text", "must be text")
        return str(part["text"])
    if kind not in ("video_url", "video", "file"):
        what = f"parts of type '{kind[:32]}'" if isinstance(kind, str) else "parts without a type"
        raise wrong(at, f"{what} are not supported: send text and one video")
    if conversation.video is not None:
        raise wrong(at, "a conversation has one video, and this is a second one")
    _warn_of_unknown(part, _PART_FIELDS, at, conversation)
    conversation.video = _video(part, kind, at, index, conversation)
    return None


def _video(
    part: dict[str, Any], kind: str, at: str, index: int, conversation: Conversation
) -> VideoPart:
    value, param = part.get(kind), f"{at}.{kind}"
    uuid = _uuid(part, at)
    inner: dict[str, Any] = {}
    if isinstance(value, dict):
        inner = value
        known = _FILE_FIELDS if kind == "file" else _VIDEO_FIELDS
        _warn_of_unknown(inner, known, param, conversation)
        uuid = _uuid(inner, param) or uuid
        names = ("file_id", "file_data") if kind == "file" else ("url",)
        given = [name for name in names if inner.get(name)]
        if len(given) != 1 and (given or uuid is None):
            raise wrong(param, f"needs {' or '.join(names)}")
        value = inner[given[0]] if given else None
        param = f"{param}.{given[0]}" if given else param
    frames: tuple[str, ...] = ()
    if kind == "video" and isinstance(value, list):
        frames = _frames(value, param)
        value = ""
    elif not value and uuid is not None:
        value = ""  # the alias alone names it
    elif not isinstance(value, str) or not value:
        raise wrong(param, "must be an id or a URL")
    said = {**_said(part, at), **_said(inner, f"{at}.{kind}")}
    return VideoPart(source=value, turn=index, param=param, frames=frames, uuid=uuid, **said)


def _frames(urls: list[Any], param: str) -> tuple[str, ...]:
    if not urls:
        raise wrong(param, "a list must have a frame")
    for place, url in enumerate(urls):
        if not isinstance(url, str) or not url:
            raise wrong(f"{param}.{place}", "must be a URL of a picture")
    return tuple(urls)


def _uuid(options: dict[str, Any], where: str) -> str | None:
    uuid = options.get("uuid")
    if uuid is not None and (not isinstance(uuid, str) or not 1 <= len(uuid) <= MAX_UUID_CHARS):
        raise wrong(f"{where}.uuid", f"must be text of 1 to {MAX_UUID_CHARS} characters")
    return uuid


def _said(options: dict[str, Any], where: str) -> dict[str, Any]:
    """An object's sampling fields, checked."""
    said = {n: options[n] for n in SAMPLING_FIELDS if options.get(n) is not None}
    for name, value in said.items():
        if name == "sampling":
            is_right, message = value in get_args(Sampling), "must be 'uniform' or 'keyframe'"
        elif name in _COUNTS:
            is_right, message = is_count(value), "must be a whole number of at least 1"
        else:
            is_right, message = is_number(value), "must be a number of at least 0"
            if name in ("fps", "end_s"):
                is_right, message = is_right and value > 0, "must be a number above 0"
        if not is_right:
            raise wrong(f"{where}.{name}", message)
    return said


def is_count(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 1


def is_number(value: Any) -> bool:
    """Whether it is a finite one of at least 0, as JSON has them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= 1e9 and math.isfinite(value)


def _warn_of_unknown(
    said: dict[str, Any], known: tuple[str, ...], where: str, conversation: Conversation
) -> None:
    names = [name for name, value in said.items() if name not in known and value is not None]
    conversation.warnings += [unknown(f"{where}.{name}") for name in names]
