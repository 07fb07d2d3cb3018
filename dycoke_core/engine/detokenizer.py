"""Turns ids into text as they arrive: never half a character, never part of a stop string.

Its state is a function of the ids pushed, so pushing an earlier attempt's ids rebuilds it.
"""

from transformers import PreTrainedTokenizerFast

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
_MAX_PENDING_TOKENS = 8  # more than any character has: then the bytes are really invalid


class Detokenizer:
    """Incremental detokenizer of one answer.

    `text` is what has been released so far; `is_stopped` turns true when a stop string appeared,
    which is cut off with all that follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...] = ()) -> None:
        self.text = ""
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._context_start = 0  # ids from here on are decoded together: spaces depend on context
        self._num_decoded = 0  # ids whose text is complete
        self._held = ""  # complete, but may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Takes the next id and returns the text that it releases, often none."""
        self._ids.append(token_id)
        return self._release(self._held + self._decode_new(is_last=False), is_last=False)

    def flush(self) -> str:
        """Releases what was held back; an incomplete character becomes U+FFFD."""
        return self._release(self._held + self._decode_new(is_last=True), is_last=True)

    def _decode_new(self, *, is_last: bool) -> str:
        known = self._decode(self._ids[self._context_start : self._num_decoded])
        whole = self._decode(self._ids[self._context_start :])
        num_pending = len(self._ids) - self._num_decoded
        is_incomplete = whole.endswith(_REPLACEMENT) and num_pending <= _MAX_PENDING_TOKENS
        if len(whole) <= len(known) or (is_incomplete and not is_last):
            return ""
        self._context_start, self._num_decoded = self._num_decoded, len(self._ids)
        return whole[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _release(self, text: str, *, is_last: bool) -> str:
        if self.is_stopped:
            return ""
        matches = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if matches:
            self.is_stopped = True
            text, self._held = text[: min(matches)], ""
        else:
            num_held = 0 if is_last else _longest_stop_prefix(text, self._stop)
            text, self._held = text[: len(text) - num_held], text[len(text) - num_held :]
        self.text += text
        return text


def _longest_stop_prefix(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    return max(
        (n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])),
        default=0,
    )
