"""uvicorn's h11 protocol, but strict about line ends.

h11 accepts a line feed alone as the end of a line, where a proxy may see no end and find other
headers than we do. httptools refuses it by itself.
"""

import re
from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer
from uvicorn.protocols.http.h11_impl import H11Protocol

_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")


class StrictReceiveBuffer(ReceiveBuffer):
    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Raises LocalProtocolError, which h11 turns into the client's."""
        before = bytes(self)
        lines = super().maybe_extract_lines()
        if lines is not None and _BARE_LINE_FEED.search(before[: len(before) - len(self)]):
            raise h11.LocalProtocolError("a line ends in a line feed alone")
        return lines


class StrictH11Protocol(H11Protocol):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn._receive_buffer = StrictReceiveBuffer()
