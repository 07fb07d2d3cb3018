import pytest

from dycoke_core.video import Container, sniff_container

_TS_PACKET = b"G" + bytes(187)


@pytest.mark.parametrize(
    ("head", "container"),
    [
        (b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00", Container.MP4),
        (b"\x00\x00\x00\x18styp", Container.MP4),
        (b"\x00\x00\x00\x08wide\x00\x00\x10\x00mdat", Container.MP4),
        (b"\x00\x00\x00\x01mdat\x00\x00\x00\x00\x00\x10\x00\x00", Container.MP4),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01", Container.MATROSKA),
        (b"RIFF\x24\x00\x00\x00AVI LIST", Container.AVI),
        (_TS_PACKET * 4, Container.MPEG_TS),
        ((bytes(4) + _TS_PACKET) * 4, Container.MPEG_TS),
        ((_TS_PACKET + bytes(16)) * 4, Container.MPEG_TS),
    ],
)
def test_containers_we_take_are_recognised(head: bytes, container: Container) -> None:
    assert sniff_container(head) is container


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\x00" * 1024,
        b"#EXTM3U\n#EXT-X-VERSION:3\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        b"RIFF\x24\x00\x00\x00WAVEfmt ",
        b"\x00\x00\x00\x04ftypisom",  # a box smaller than its own header
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        _TS_PACKET,  # one sync byte proves nothing
        b"<html><body>ftyp</body></html>",
    ],
)
def test_everything_else_is_not(head: bytes) -> None:
    assert sniff_container(head) is None
