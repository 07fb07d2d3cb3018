"""Renders a job's events as a chat completion: chunks of a stream, or one object.

A chunk of the stream is a bare `data:` line, for clients that know neither comments nor named
events. A heartbeat is a pair of line breaks: benchmarks split the stream at such pairs, and a
single break would stay in front of the next chunk and hide it. One token event is one chunk, the
role goes with the first token and `finish_reason` with the last, because benchmarks count every
chunk with choices as a token. `[DONE]` ends the stream; an interrupted one ends without it.

All chunks between the first and the last differ only in their text, which is inserted between a
fixed beginning and end: no event is parsed and no JSON is made.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.api.answer.feed import FINAL_TYPES, FeedItem
from app.api.openai.errors import error_object
from app.messages import DoneEvent, ErrorEvent, TokenEvent, token_text
from app.store.job_queue import JobRecord

DONE = b"data: [DONE]\n\n"
NOT_IN_RECEIPT = {"type", "text"}  # of the job's last event: a completion says them elsewhere
_NO_TEXT = b'"content":""'


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """
    Args:
        include_usage: in a chunk of its own, the last one.
        continuous_usage: on every other chunk too, as it is then.
    """

    include_usage: bool = False
    continuous_usage: bool = False


class ChatCompletion:
    """One answer. See `app.api.answer.sse.Rendering`."""

    heartbeat = b"\n\n"

    def __init__(self, record: JobRecord, options: StreamOptions) -> None:
        self._head = {
            "id": f"chatcmpl-{record.job_id}",
            "created": int(record.accepted_at_s),
            "model": record.model,
        }
        self._has_usage = options.include_usage
        self._has_continuous_usage = options.continuous_usage
        self._prompt_tokens: int | None = None  # known with the first token
        self._has_role = False
        self._around_text: tuple[bytes, bytes] | None = None  # in a chunk between first and last

    def render(self, batch: Sequence[FeedItem]) -> bytes:
        if self._around_text is not None and not (batch and batch[-1].type in FINAL_TYPES):
            before, after = self._around_text
            texts = [token_text(item.data) for item in batch if item.type == "token"]
            return b"".join([before + text + after for text in texts])
        return self._render_first_or_last(batch) if batch else b""

    def _render_first_or_last(self, batch: Sequence[FeedItem]) -> bytes:
        """Or any, where each says how many tokens there are by now."""
        events = [item.event for item in batch]
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        final = events[-1]
        done = final if isinstance(final, DoneEvent) else None
        chunks = [self._token_chunk(token) for token in tokens]
        if done is not None:
            chunks = self._finished(chunks, done)
        frames = b"".join(map(_frame, chunks))
        if self._has_role and not self._has_continuous_usage:
            before, _, after = _frame(self._chunk("")).partition(_NO_TEXT)
            self._around_text = before + _NO_TEXT[:-2], after
        if isinstance(final, ErrorEvent):
            frames += self.interruption(final)
        return frames + DONE if isinstance(final, DoneEvent | ErrorEvent) else frames

    def interruption(self, event: ErrorEvent) -> bytes:
        return _frame({"error": error_object(event.code, event.message)})

    def body(self, done: DoneEvent) -> dict[str, Any]:
        message = {"role": "assistant", "content": done.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": done.finish_reason,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(done),
            "dycoke": receipt(done),
        }

    def _finished(self, chunks: list[dict[str, Any]], done: DoneEvent) -> list[dict[str, Any]]:
        """The last chunks of an answer. Its last token nearly always comes with its end."""
        chunks = chunks or [self._chunk("")]
        last = chunks[-1]
        last["choices"][0]["finish_reason"] = done.finish_reason
        if self._has_continuous_usage:
            last["usage"] = _counts(done.usage.prompt_tokens, done.usage.completion_tokens)
        if self._has_usage:
            last = {**self._chunk_head(), "choices": [], "usage": usage(done)}
            chunks.append(last)
        last["dycoke"] = receipt(done)
        return chunks

    def _token_chunk(self, token: TokenEvent) -> dict[str, Any]:
        chunk = self._chunk(token.text)
        self._prompt_tokens = token.prompt_tokens or self._prompt_tokens
        if self._has_continuous_usage and self._prompt_tokens is not None:
            chunk["usage"] = _counts(self._prompt_tokens, token.index + len(token.token_ids))
        return chunk

    def _chunk(self, text: str) -> dict[str, Any]:
        delta: dict[str, str] = {} if self._has_role else {"role": "assistant"}
        self._has_role = True
        delta["content"] = text
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._chunk_head(), "choices": [choice]}

    def _chunk_head(self) -> dict[str, Any]:
        head = {**self._head, "object": "chat.completion.chunk"}
        return {**head, "usage": None} if self._has_usage else head


def usage(done: DoneEvent) -> dict[str, Any]:
    """`prompt_tokens` are what the language model saw: what compression dropped is in none."""
    used = done.usage
    return {
        **_counts(used.prompt_tokens, used.completion_tokens),
        "prompt_tokens_details": {
            "cached_tokens": done.cached_tokens,
            "multimodal_tokens": {"video": used.visual_tokens},
        },
    }


def _counts(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def receipt(done: DoneEvent) -> dict[str, Any]:
    """The rest of what the job's last event says."""
    return done.model_dump(mode="json", exclude=NOT_IN_RECEIPT)


def _frame(data: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
