"""Recognises the containers we take by their first bytes, before any demuxer sees the file.

Text formats that make a demuxer open other files or sockets (HLS, concat, SDP) have no magic number
of these and stop here. What passes is demuxed as what it was recognised as, never guessed again.
"""

from enum import StrEnum

from dycoke_core.video.frame_list import MAGIC

SNIFF_BYTES = 1024

# A QuickTime or MP4 file opens with one of these boxes; `styp` opens a media segment.
_ISO_BMFF_BOXES = frozenset({b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip"})
# Offset of the first sync byte and distance to the next: plain, Blu-ray, with error correction.
_TS_LAYOUTS = ((0, 188), (4, 192), (0, 204))
_TS_SYNC = 0x47


class Container(StrEnum):
    """A container we take. The value is public (in probes)."""

    MP4 = "mp4"  # ISO base media: mp4, mov, fragmented
    MATROSKA = "matroska"  # and WebM
    AVI = "avi"
    MPEG_TS = "mpegts"
    FRAMES = "frames"  # a list of pictures, in a form of our own: `frame_list`

    @property
    def demuxer(self) -> str:
        """FFmpeg's name for the demuxer that must read it."""
        return "mov" if self is Container.MP4 else str(self)


def sniff_container(head: bytes) -> Container | None:
    """Returns the container that a file starting with `head` is in, None for all others.

    Args:
        head: the first `SNIFF_BYTES` of the file, or all of a shorter one.
    """
    if head.startswith(MAGIC):
        return Container.FRAMES
    if head[4:8] in _ISO_BMFF_BOXES and _is_box_size(head[:4]):
        return Container.MP4
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return Container.MATROSKA
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return Container.AVI
    if any(_has_sync_bytes(head, offset, stride) for offset, stride in _TS_LAYOUTS):
        return Container.MPEG_TS
    return None


def _is_box_size(field: bytes) -> bool:
    size = int.from_bytes(field, "big")
    return size in (0, 1) or size >= 8  # 0: to the end of the file; 1: a 64-bit size follows


def _has_sync_bytes(head: bytes, offset: int, stride: int) -> bool:
    syncs = head[offset::stride]
    return len(syncs) >= 3 and all(byte == _TS_SYNC for byte in syncs)
