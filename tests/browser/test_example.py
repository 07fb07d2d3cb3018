"""`examples/browser.html`, as it stands, from an origin of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import httpx
from playwright.sync_api import Browser, expect

from tests.browser.watched import PATIENCE_MS
from tests.serving import CLIP, PATIENCE_S, ROOT, running_service

QUESTION = "What happens in the video?"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def other_origin() -> Iterator[str]:
    """What `python -m http.server --directory examples` serves."""
    handler = partial(Quiet, directory=str(ROOT / "examples"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_a_page_of_another_origin_asks_and_follows(browser: Browser) -> None:
    with (
        other_origin() as origin,
        running_service(ROOT, {"DYCOKE_ALLOWED_ORIGINS": origin}) as url,
    ):
        fields = {"question": QUESTION, "max_tokens": "20", "stream": "false"}
        files = {"video": CLIP.read_bytes()}
        expected = httpx.post(
            f"{url}/v1/video/chat", data=fields, files=files, timeout=PATIENCE_S
        ).json()["text"]
        complaints: list[str] = []
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{origin}/browser.html?url={url}")
        page.get_by_label("Video").set_input_files(CLIP)
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#receipt")).to_contain_text("% of the visual tokens kept")
        assert page.locator("#answer").text_content() == expected
        assert complaints == []
        page.close()
