"""Which demuxer a library that carries FFmpeg would choose for a file. Imported by children only.

decord lets FFmpeg guess, so a file that we recognised as one container could be demuxed as another
(a box of an MP4 file may hold what looks like a transport stream). This asks the very copy of
FFmpeg that the library has loaded. Opens no demuxer.
"""

import ctypes
import os

_AVIO_READ = 1


class _InputFormat(ctypes.Structure):
    """The start of AVInputFormat."""

    _fields_ = (("name", ctypes.c_char_p),)


class DemuxerGuess:
    """Args:
    library: the loaded libavformat, or None if there is none to ask.
    """

    def __init__(self, library: ctypes.CDLL | None) -> None:
        self._library = library

    @classmethod
    def of_loaded_library(cls) -> "DemuxerGuess":
        """Of the only libavformat in this process."""
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "libavformat" in line}
        return cls(ctypes.CDLL(paths.pop()) if len(paths) == 1 else None)

    def names(self, path: str) -> tuple[str, ...]:
        """Returns the names of the demuxer that would be chosen; none where that is not known."""
        if self._library is None:
            return ()
        file, chosen = ctypes.c_void_p(), ctypes.POINTER(_InputFormat)()
        url = os.fsencode(path)
        if self._library.avio_open(ctypes.byref(file), url, _AVIO_READ) < 0:
            return ()
        try:
            self._library.av_probe_input_buffer2(file, ctypes.byref(chosen), url, None, 0, 0)
        finally:
            self._library.avio_closep(ctypes.byref(file))
        return tuple(chosen.contents.name.decode().split(",")) if chosen else ()
