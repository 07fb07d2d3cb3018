"""What may be fetched, and that nothing else is ever dialled: every known trick."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.api.errors import InvalidFieldsError
from app.api.openai.dialling import is_global
from app.errors import UploadTooLargeError
from tests.app.api.openai.net import (
    OTHER,
    PUBLIC,
    VIDEO,
    Net,
    fetch,
    redirect,
    response,
    running_net,
)

PAGES = {
    "/clip.mp4": response("200 OK", f"Content-Length: {len(VIDEO)}", body=VIDEO),
    "/unmeasured": response("200 OK", body=VIDEO),
    "/huge": response("200 OK", "Content-Length: 99999999999"),
    "/gzip": response("200 OK", "Content-Encoding: gzip", body=VIDEO),
    "/secret": response("403 Forbidden", body=b"the password is swordfish"),
    "/short": response("200 OK", "Content-Length: 1000", body=b"only this"),
    "/garbage": b"SSH-2.0-OpenSSH\r\n",
    "/moved": redirect("/clip.mp4"),
    "/elsewhere": redirect("http://both.example.com/clip.mp4"),
    "/metadata": redirect("http://169.254.169.254/latest/meta-data/"),
    "/inside": redirect("http://inside.example.com/clip.mp4"),
    "/file": redirect("file:///etc/passwd"),
    "/port": redirect("http://cdn.example.com:6379/"),
    "/user": redirect("http://me:secret@cdn.example.com/clip.mp4"),
    "/loop": redirect("/loop"),
    "/cookie": response("302 Found", "Set-Cookie: a=b; Path=/", "Location: /clip.mp4"),
    "/bad": redirect("http://[::1"),
}


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    async with running_net(PAGES) as net:
        yield net


@pytest.mark.parametrize(
    ("url", "domain", "dialled"),
    [
        ("http://cdn.example.com/clip.mp4", "cdn.example.com", [(PUBLIC, 80)]),
        ("http://CDN.Example.com./unmeasured", "cdn.example.com", [(PUBLIC, 80)]),
        ("http://cdn.example.com:443/clip.mp4", "*.example.com", [(PUBLIC, 443)]),
        ("http://cdn.example.com/moved", "*", [(PUBLIC, 80), (PUBLIC, 80)]),
        ("http://cdn.example.com/elsewhere", "*.example.com", [(PUBLIC, 80), (OTHER, 80)]),
        ("http://bücher.example.com/clip.mp4", "*.example.com", [(PUBLIC, 80)]),
        (f"http://{PUBLIC}/clip.mp4", PUBLIC, [(PUBLIC, 80)]),
        (f"http://[{OTHER}]/clip.mp4", "*", [(OTHER, 80)]),
    ],
)
async def test_what_is_allowed_is_fetched_from_the_address_that_was_checked(
    url: str, domain: str, dialled: list[tuple[str, int]], net: Net
) -> None:
    if url.endswith(".") or "com./" in url:
        net.answers["cdn.example.com."] = [[PUBLIC]]
    assert await fetch(net, url, domain) == VIDEO
    assert net.dialled == dialled


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.com/clip.mp4",
        "http://example.com/clip.mp4",  # *.example.com is what is below it
        "http://notexample.com/clip.mp4",
        "http://cdn.example.com.evil.com/clip.mp4",
        "http://cdn.example.com@evil.com/clip.mp4",
        "http://me:secret@cdn.example.com/clip.mp4",
        "http://cdn.example.com:6379/",
        "http://cdn.example.com:22/",
        "https://cdn.example.com:8443/",
        "ftp://cdn.example.com/clip.mp4",
        "gopher://cdn.example.com/",
        "javascript:alert(1)",
        "http:///clip.mp4",
        "http://",
        "//cdn.example.com/clip.mp4",
        "http://[::1/",
        "http://evil.com./clip.mp4",
        "http://cdn.example.com.evil.com./clip.mp4",
        "http://evil.com#@cdn.example.com/clip.mp4",
        "http://evil.com?.example.com/clip.mp4",
        "http://evil.com/.example.com",
        "http://evil.com%2f.example.com/clip.mp4",
        "http://cdn.example.com:80@evil.com/clip.mp4",
        "http://cdn%2eexample.com.evil.com/clip.mp4",
        "http://cdn.examp1e.com/clip.mp4",
        "http://cdn.\u0435\u0445ample.com/clip.mp4",  # Cyrillic letters
        "http://cdn.example\u3002com.evil.com/clip.mp4",
        "http://cdn.example.com\\@evil.com/",
        "http://cdn.example.com\n.evil.com/",
        "vid_unknown",
        "",
    ],
)
async def test_what_is_not_allowed_is_not_even_resolved(url: str, net: Net) -> None:
    with pytest.raises(InvalidFieldsError) as refused:
        await fetch(net, url, "*.example.com")
    assert refused.value.problems[0].field == "here" and not net.dialled


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f.1",
        "127.1",
        "0177.0.0.1",
        "0x7f000001",
        "0",
        "127.0.0.1.",
        "169.254.169.254.",
        "%31%32%37.0.0.1",
        "\uff11\uff12\uff17.0.0.1",  # wide digits
        "127\u30020\u30020\u30021",
        "localhost",
        "LOCALHOST.",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "100.100.100.200",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "[::]",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[0:0:0:0:0:ffff:a9fe:a9fe]",
        "[::ffff:0:127.0.0.1]",
        "[fe80::1%25lo]",
        f"[::ffff:{PUBLIC}]",
        "[::7f00:1]",
        "[fe80::1]",
        "[fc00::1]",
        "[fec0::1]",
        "[ff02::1]",
        "[fd00:ec2::254]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b:1::a9fe:a9fe]",
        "[2002:7f00:1::]",
        "[2001:0:7f00:1::]",
        "inside.example.com",
        "half.example.com",
        "nowhere.example.com",
    ],
)
async def test_nothing_is_dialled_that_is_not_public_whoever_is_allowed(
    host: str, net: Net
) -> None:
    with pytest.raises(InvalidFieldsError) as refused:
        await fetch(net, f"http://{host}/clip.mp4", "*")
    assert not net.dialled
    assert "fetched" in refused.value.message or "valid" in refused.value.message


@pytest.mark.parametrize(
    ("page", "num_dialled"),
    [
        ("metadata", 1),
        ("inside", 1),
        ("file", 1),
        ("port", 1),
        ("user", 1),
        ("bad", 1),
        ("loop", 4),
        ("gzip", 1),
        ("secret", 1),
        ("short", 1),
        ("garbage", 1),
        ("missing", 1),
    ],
)
async def test_what_comes_back_is_checked_like_the_first_url(
    page: str, num_dialled: int, net: Net
) -> None:
    with pytest.raises(InvalidFieldsError) as refused:
        await fetch(net, f"http://cdn.example.com/{page}", "*")
    assert net.dialled == [(PUBLIC, 80)] * num_dialled
    for word in ("169.254", "10.0.0.7", "swordfish", "SSH", "403", "404"):
        assert word not in refused.value.message


async def test_a_cookie_that_comes_with_a_redirect_is_not_sent(net: Net) -> None:
    assert await fetch(net, "http://cdn.example.com/cookie", "*") == VIDEO
    assert len(net.heads) == 2
    assert not any(b"\ncookie:" in head.lower() for head in net.heads)


async def test_proxies_and_passwords_of_the_environment_are_ignored(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        for each in (name, name.lower()):
            monkeypatch.setenv(each, "http://10.0.0.7:3128")
    netrc = tmp_path / ".netrc"
    netrc.write_text("default login me password swordfish")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert await fetch(net, "http://cdn.example.com/moved", "*") == VIDEO
    assert net.dialled == [(PUBLIC, 80), (PUBLIC, 80)]
    assert not any(b"authorization:" in head.lower() for head in net.heads)
    assert [head.split(b" ")[1] for head in net.heads] == [b"/moved", b"/clip.mp4"]


async def test_a_second_resolution_has_no_say(net: Net) -> None:
    """The name turns to an inner address as soon as it has been checked."""
    net.answers["cdn.example.com"] = [[PUBLIC], ["127.0.0.1"]]
    assert await fetch(net, "http://cdn.example.com/clip.mp4", "*") == VIDEO
    assert net.dialled == [(PUBLIC, 80)]
    with pytest.raises(InvalidFieldsError):  # and is checked again with the next URL
        await fetch(net, "http://cdn.example.com/clip.mp4", "*")
    assert net.dialled == [(PUBLIC, 80)]


async def test_the_next_address_is_tried_where_one_does_not_answer(net: Net) -> None:
    net.refused = {OTHER}
    assert await fetch(net, "http://both.example.com/clip.mp4", "*") == VIDEO
    assert net.dialled == [(OTHER, 80), (PUBLIC, 80)]


async def test_what_is_announced_too_large_is_not_read(net: Net) -> None:
    with pytest.raises(UploadTooLargeError):
        await fetch(net, "http://cdn.example.com/huge", "*")


async def test_nothing_is_allowed_by_default(net: Net) -> None:
    for url in ("http://cdn.example.com/clip.mp4", "file:///etc/passwd"):
        with pytest.raises(InvalidFieldsError):
            await fetch(net, url)
    assert not net.dialled


@pytest.mark.parametrize("address", [PUBLIC, OTHER, "8.8.8.8", "2a00:1450:4001::1"])
def test_public_addresses_are_known(address: str) -> None:
    assert is_global(address)


# --- files ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    (folder / "a b").mkdir(parents=True)
    (folder / "a b" / "clip.mp4").write_bytes(VIDEO)
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "out").symlink_to(tmp_path)
    (folder / "same").symlink_to(folder / "a b" / "clip.mp4")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize("prefix", ["file://", "file://localhost", "FILE://", "file:"])
async def test_files_of_the_folder_are_read(prefix: str, folder: Path, net: Net) -> None:
    url = f"{prefix}{folder}/a%20b/clip.mp4"
    assert await fetch(net, url, folder=folder) == VIDEO


@pytest.mark.parametrize(
    "path",
    [
        "{folder}/../secret",
        "{folder}/%2e%2e/secret",
        "{folder}/a%20b/../../secret",
        "{folder}/link",
        "{folder}/same",
        "{folder}/out/secret",
        "{folder}/pipe",
        "{folder}/a%20b",
        "{folder}",
        "{folder}/missing",
        "{folder}/clip%00.mp4",
        "{folder}2/clip.mp4",
        "{folder}/%ff",
        "/proc/self/environ",
        "/etc/passwd",
        "//evil.com{folder}/a%20b/clip.mp4",
    ],
)
async def test_no_other_file_is(path: str, folder: Path, net: Net) -> None:
    url = "file:" + ("" if path.startswith("//") else "//") + path.format(folder=folder)
    with pytest.raises(InvalidFieldsError, match="reads no such file"):
        await fetch(net, url, "*", folder=folder)
