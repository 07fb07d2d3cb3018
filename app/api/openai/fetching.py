"""Fetches videos by URL, from hosts and from one folder that an operator has allowed.

The address that is dialled is the one that was checked: see `dialling`. Redirects are followed by
hand, and each is checked like the first URL. Proxies, credentials and cookies are not used, and an
error contains neither an address nor anything from the response.

What arrives is untrusted: the caller sniffs it and hands it to the sandbox like any upload, and its
bytes count as the key's incoming bytes. A small post can name a large file, so a key may have few
fetches at a time in a process; further ones wait, for as long as a body may take to arrive.
"""

import asyncio
import os
import re
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NoReturn
from urllib.parse import unquote, urlsplit

import httpcore
import httpx

from app.api.connection.bodies import IDLE_S, MIN_BYTES_S
from app.api.connection.pace import Pace
from app.api.openai.dialling import CheckedBackend, Dial, Resolve, Resolver, dial_address
from app.api.openai.fields import wrong
from app.api.post.fair_budget import FairBudget
from app.errors import UploadTooLargeError
from app.keys.access import is_allowed
from app.threads import in_thread

MAX_REDIRECTS = 3
MAX_FETCH_S = 120.0
CONNECT_S = 10.0
MAX_FETCHES = 32  # at a time
MAX_FETCHES_OF_A_KEY = 4  # of those
READ_BYTES = 1 << 20  # of a file at a time
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[\w.:\[\]-]+", re.ASCII)  # a name has nothing to be unescaped

Write = Callable[[bytes], Awaitable[None]]


class StorageFailedError(Exception):
    """What was fetched could not be written."""


class MediaFetcher:
    """
    Args:
        domains: hosts, `*.suffix` for all below one, or `*` for any; none: nothing is fetched.
        folder: whose files may be named by `file:`; None: none may.
        max_bytes: of a video.
    """

    def __init__(
        self,
        domains: Iterable[str],
        folder: Path | None,
        *,
        max_bytes: int,
        resolve: Resolve | None = None,
        dial: Dial | None = None,
    ) -> None:
        self._domains = tuple(domain.lower().rstrip(".") for domain in domains)
        self._folder = folder
        self._max_bytes = max_bytes
        # Reading the authorities takes milliseconds of the event loop: once, and only if needed.
        self._tls = ssl.create_default_context() if self._domains else None
        self._resolve_for = Resolver().of if resolve is None else lambda _: resolve
        self._dial = dial or dial_address
        self._under_way = FairBudget(MAX_FETCHES, max_of_one=MAX_FETCHES_OF_A_KEY)

    async def fetch(self, url: str, param: str, write: Write, *, owner: str) -> None:
        """Writes the video that a URL names, for a key's holder.

        Raises:
            InvalidFieldsError: it may not be fetched, or cannot; names `param`.
            UploadTooLargeError
        """
        async with self._under_way.taken(1, owner):
            await self._fetch_any(url, param, self._capped(write), owner)

    async def _fetch_any(self, url: str, param: str, write: Write, owner: str) -> None:
        if url[:5].lower() == "file:":
            await self._read_file(url, param, write)
            return
        try:
            async with asyncio.timeout(MAX_FETCH_S):
                backend = CheckedBackend(self._resolve_for(owner), self._dial)
                await self._fetch(url, param, write, backend)
        except UnicodeError:
            raise wrong(param, "the URL's host is not a host name") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError):
            _fail(param)  # a TimeoutError is an OSError

    def _capped(self, write: Write) -> Write:
        num_bytes = 0

        async def write_capped(data: bytes) -> None:
            nonlocal num_bytes
            num_bytes += len(data)
            if num_bytes > self._max_bytes:
                raise self._too_large()
            try:
                await write(data)
            except OSError as error:  # of our own disk: nothing that the URL is to blame for
                raise StorageFailedError from error

        return write_capped

    def _too_large(self) -> UploadTooLargeError:
        return UploadTooLargeError.of_video(self._max_bytes)

    # --- http and https ---

    async def _fetch(self, text: str, param: str, write: Write, backend: CheckedBackend) -> None:
        url = self._checked(text, param)
        for _ in range(MAX_REDIRECTS + 1):
            async with self._response(url, backend) as response:
                location = _header(response, b"location")
                if response.status in (301, 302, 303, 307, 308) and location is not None:
                    url = self._checked(str(_joined(url, location, param)), param)
                    continue
                await self._take(response, param, write)
                return
        raise wrong(param, f"the URL is redirected more than {MAX_REDIRECTS} times")

    def _checked(self, text: str, param: str) -> httpx.URL:
        """A URL that may be dialled, if its addresses may."""
        try:
            url = httpx.URL(text)
        except (httpx.InvalidURL, ValueError):
            raise wrong(param, "is not a valid URL such as https://example.com/clip.mp4") from None
        if url.scheme not in _PORTS:
            raise wrong(param, "must be a data:, http or https URL, or the id of a stored video")
        if url.userinfo or not url.host:
            raise wrong(param, "a URL must have a host, and no user name or password")
        if url.port not in (None, *_PORTS.values()):
            raise wrong(param, "a URL's port must be 80 or 443")
        host = url.raw_host.decode("ascii")
        if not _HOST.fullmatch(host):
            raise wrong(param, "is not a valid URL such as https://example.com/clip.mp4")
        if not self._is_allowed(host):
            raise wrong(
                param,
                "this server does not fetch from this host; DYCOKE_ALLOWED_MEDIA_DOMAINS lists "
                "those it does, and POST /v1/videos takes any video",
            )
        return url

    def _is_allowed(self, host: str) -> bool:
        return is_allowed(host.lower().rstrip("."), self._domains)

    @asynccontextmanager
    async def _response(
        self, url: httpx.URL, backend: CheckedBackend
    ) -> AsyncIterator[httpcore.Response]:
        port = url.port or _PORTS[url.scheme]
        target = httpcore.URL(scheme=url.scheme, host=url.raw_host, port=port, target=url.raw_path)
        headers = [
            (b"Host", url.netloc),
            (b"Accept", b"*/*"),
            (b"Accept-Encoding", b"identity"),
            (b"User-Agent", b"dycoke-serve"),
            (b"Connection", b"close"),
        ]
        timeouts = {"connect": CONNECT_S, "read": IDLE_S, "write": IDLE_S, "pool": None}
        async with AsyncExitStack() as stack:
            pool = await stack.enter_async_context(
                httpcore.AsyncConnectionPool(
                    ssl_context=self._tls,
                    max_connections=1,
                    network_backend=backend,
                )
            )
            yield await stack.enter_async_context(
                pool.stream("GET", target, headers=headers, extensions={"timeout": timeouts})
            )

    async def _take(self, response: httpcore.Response, param: str, write: Write) -> None:
        if response.status != 200:
            _fail(param)
        if (_header(response, b"content-encoding") or "identity").lower() != "identity":
            _fail(param)
        announced = _header(response, b"content-length") or ""
        if announced.isdecimal() and int(announced[:20]) > self._max_bytes:
            raise self._too_large()
        now = asyncio.get_running_loop().time
        pace, waits_since = Pace(), now()
        async with aclosing(response.aiter_stream()) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                pace.wait(now() - waits_since)
                pace.take(len(chunk), MIN_BYTES_S)
                if pace.behind_s > IDLE_S:
                    _fail(param)  # it comes too slowly
                await write(chunk)
                waits_since = now()

    # --- files ---

    async def _read_file(self, url: str, param: str, write: Write) -> None:
        fd = await in_thread(partial(self._open, url, param), undo=os.close)
        try:
            while data := await in_thread(partial(os.read, fd, READ_BYTES)):
                await write(data)
        except OSError:
            _fail(param)
        finally:
            os.close(fd)

    def _open(self, url: str, param: str) -> int:
        """Opens a regular file under the folder, following no symbolic link below it."""
        refusal = wrong(
            param,
            "this server reads no such file; those it does are below DYCOKE_ALLOWED_MEDIA_PATH",
        )
        try:
            parts = urlsplit(url)
            path = PurePosixPath(unquote(parts.path, errors="strict"))
        except ValueError:
            raise refusal from None
        if self._folder is None or parts.netloc not in ("", "localhost") or parts.query:
            raise refusal
        folder = PurePosixPath(self._folder.absolute())
        if ".." in path.parts or "\0" in str(path) or not path.is_relative_to(folder):
            raise refusal
        names = path.relative_to(folder).parts
        try:
            return _open_below(self._folder, names)
        except OSError:
            raise refusal from None


def _open_below(folder: Path, names: tuple[str, ...]) -> int:
    """Opens name by name, so that nothing can be exchanged on the way."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        for name in names[:-1]:
            below = os.open(name, flags | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        # Not to wait for the other end of a pipe.
        file = os.open(names[-1] if names else ".", flags | os.O_NONBLOCK, dir_fd=fd)
    finally:
        os.close(fd)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError("not a regular file")
    return file


def _joined(url: httpx.URL, location: str, param: str) -> httpx.URL:
    try:
        return url.join(location)
    except (httpx.InvalidURL, ValueError):
        _fail(param)


def _header(response: httpcore.Response, name: bytes) -> str | None:
    values = [value for key, value in response.headers if key.lower() == name]
    return values[0].decode("latin-1") if values else None


def _fail(param: str) -> NoReturn:
    raise wrong(
        param, "the URL could not be fetched; POST /v1/videos takes the video itself"
    ) from None
