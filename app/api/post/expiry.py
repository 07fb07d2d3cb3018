"""`expires_after` of an upload: a number of seconds, or OpenAI's anchor and seconds.

OpenAI's client writes an object into a form as `expires_after[anchor]` and
`expires_after[seconds]`.
"""

from collections.abc import Sequence

from pydantic_core import from_json

from app.api.errors import InvalidFieldsError

NAME = "expires_after"
ANCHOR = "created_at"
MAX_SECONDS = 30 * 24 * 3600  # as OpenAI allows it

_MALFORMED = f"must be seconds, at most {MAX_SECONDS}, or {{anchor: '{ANCHOR}', seconds}}"


def take_expiry(
    fields: Sequence[tuple[str, str]], created_at_s: float
) -> tuple[float | None, list[tuple[str, str]]]:
    """Finds `expires_after` among a form's fields.

    Returns:
        Unix time at which the video expires, or None if not given; and the other fields.

    Raises:
        InvalidFieldsError
    """
    said: dict[str, object] = {}
    others = []
    for name, text in fields:
        if name in (f"{NAME}[anchor]", f"{NAME}[seconds]"):
            said[name[len(NAME) + 1 : -1]] = text
        elif name == NAME:
            said |= _parse(text)
        else:
            others.append((name, text))
    if not said:
        return None, others
    if said.get("anchor", ANCHOR) != ANCHOR or said.keys() - {"anchor", "seconds"}:
        raise _malformed()
    return created_at_s + _seconds(said.get("seconds")), others


def _parse(text: str) -> dict[str, object]:
    try:
        value = from_json(text)
    except ValueError:
        raise _malformed() from None
    return value if isinstance(value, dict) else {"seconds": value}


def _seconds(value: object) -> int:
    text = value if isinstance(value, str) else str(value)
    if isinstance(value, bool) or not text.isascii() or not text.isdecimal() or len(text) > 10:
        raise _malformed()
    if not 1 <= int(text) <= MAX_SECONDS:
        raise _malformed()
    return int(text)


def _malformed() -> InvalidFieldsError:
    return InvalidFieldsError.of(NAME, _MALFORMED)
