"""A page of a real Chromium that records what must never happen on ours: errors on the console,
reports of the content security policy, requests to other hosts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request

PATIENCE_MS = 60_000.0
# Policy reports come to the console as well; this names what they are about.
REPORT_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`policy: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""


@dataclass(frozen=True)
class Look:
    """How a browser shows the page."""

    scheme: Literal["light", "dark"]
    width: int

    def __str__(self) -> str:
        return f"{self.scheme}-{self.width}"


@dataclass
class Watched:
    page: Page
    host: str
    tolerated: str | None
    complaints: list[str] = field(default_factory=list)

    def _on_console(self, message: ConsoleMessage) -> None:
        is_expected = self.tolerated is not None and self.tolerated in message.text
        if message.type in ("error", "warning") and not is_expected:
            self.complaints.append(f"{message.type}: {message.text}")

    def _on_request(self, request: Request) -> None:
        where = urlsplit(request.url)
        if where.scheme not in ("blob", "data") and where.netloc != self.host:
            self.complaints.append(f"request: {request.url}")

    def watch(self) -> None:
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        self.page.on("request", self._on_request)
        self.page.add_init_script(REPORT_VIOLATIONS)


@contextmanager
def watched_page(
    browser: Browser, url: str, look: Look, *, tolerated: str | None = None
) -> Iterator[Page]:
    """A page with its own storage; fails when it closes if anything was recorded.

    Args:
        tolerated: part of a console message, of a request that the test has the service refuse.
    """
    context = browser.new_context(
        base_url=url,
        color_scheme=look.scheme,
        viewport={"width": look.width, "height": 800},
        reduced_motion="reduce",
    )
    context.set_default_timeout(PATIENCE_MS)
    watched = Watched(context.new_page(), urlsplit(url).netloc, tolerated)
    watched.watch()
    try:
        yield watched.page
        assert watched.complaints == []
    finally:
        context.close()
