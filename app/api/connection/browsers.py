"""ASGI middleware: stops pages of other sites from using a service through a visitor's browser.

If an attacker points a name at this machine (DNS rebinding), a page's requests become same-origin,
and a form may be posted anywhere without permission. A key stops both. Without keys the service
takes only requests for its own names, and takes requests that write only from its own pages or from
allowed origins. Clients other than browsers send no `Origin`.
"""

import re
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import response_for
from app.errors import HostNotAllowedError, OriginNotAllowedError
from app.keys.access import is_allowed, is_loopback_name
from dycoke_core.errors import DycokeError, InvalidRequestError

# Probes and scrapes use addresses. These paths reveal nothing about anybody and change nothing.
OPEN_TO_ANY_HOST = frozenset({"/livez", "/readyz", "/metrics"})
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_PORT = re.compile(r":[0-9]*$")


class BrowserGuard:
    """Args:
    allowed_hosts: names, without ports, `*.` before a suffix, or `*`; None: loopback names while
        there are no keys, else any.
    allowed_origins: as browsers write them.
    count_rejection: called with the code of every post that is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: Collection[str] | None,
        allowed_origins: Collection[str],
        has_keys: Callable[[], bool],
        count_rejection: Callable[[str], None],
    ) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts
        self._allowed_origins = allowed_origins
        self._has_keys = has_keys
        self._count_rejection = count_rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except DycokeError as error:
                if scope["method"] == "POST":
                    self._count_rejection(error.code)
                refusal = response_for(error)
                refusal.headers["Connection"] = "close"  # what follows may not be a request at all
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        # Where a proxy may have gone by another of several headers, the request's end is in doubt.
        encodings = headers.getlist("transfer-encoding")
        if encodings and "content-length" in headers:
            raise InvalidRequestError("send Transfer-Encoding or Content-Length, not both")
        if encodings and [encoding.lower() for encoding in encodings] != ["chunked"]:
            raise InvalidRequestError("Transfer-Encoding may be 'chunked' alone, and once")
        if _asks_for_upgrade(headers) and (encodings or headers.get("content-length", "0") != "0"):
            # httptools takes the body for what comes after the upgrade, and then for requests.
            raise InvalidRequestError(
                "a request with a body may not ask for an upgrade: leave out its Upgrade header"
            )
        hosts = headers.getlist("host")
        if len(hosts) > 1:
            raise InvalidRequestError("send one Host header")
        if scope["path"] not in OPEN_TO_ANY_HOST:
            self._check_host(hosts[0] if hosts else "")
        if scope["method"] not in READING_METHODS:
            self._check_origin(headers)

    def _check_host(self, host: str) -> None:
        if self._allowed_hosts is None and self._has_keys():
            return
        if not self._is_ours(_PORT.sub("", host).lower()):
            raise HostNotAllowedError(
                "the Host header names a host that this service does not answer for; "
                "DYCOKE_ALLOWED_HOSTS lists those it does"
            )

    def _is_ours(self, name: str) -> bool:
        if self._allowed_hosts is None:
            return is_loopback_name(name)
        return is_allowed(name, self._allowed_hosts)

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin in self._allowed_origins:
            return
        is_own = origin is None or _host_of(origin) == headers.get("host", "").lower()
        if not is_own or headers.get("sec-fetch-site") == "cross-site":
            raise OriginNotAllowedError(
                "the Origin header names another site, whose pages may not write here; "
                "DYCOKE_ALLOWED_ORIGINS lists those that may"
            )


def _asks_for_upgrade(headers: Headers) -> bool:
    return "upgrade" in headers and "upgrade" in ",".join(headers.getlist("connection")).lower()


def _host_of(origin: str) -> str | None:
    """Name and port, as a Host header has them; None for an opaque origin."""
    scheme, separator, host = origin.lower().partition("://")
    return host if separator and scheme in ("http", "https") else None
