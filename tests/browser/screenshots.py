"""The pictures of the page in docs/images: `python -m tests.browser.screenshots`."""

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.services import ROOT, whole_service
from tests.browser.watched import PATIENCE_MS, Look, watched_page

IMAGES = ROOT / "docs" / "images"
QUALITY = 82


def take_all(browser: Browser, url: str, folder: Path) -> None:
    with watched_page(browser, url, Look("light", 1280)) as page:
        _ask(page, is_comparing=True)
        _save(page.locator(".columns").screenshot(), folder / "page.webp")
        page.get_by_text("Stage II").click()
        expect(page.locator("kept-view .legend")).to_contain_text("attended to")
        _save(page.locator("section:has(kept-view)").screenshot(), folder / "kept-tokens.webp")
        _save(page.locator("section:has(receipt-table)").screenshot(), folder / "receipt.webp")
        _save(page.locator("section:has(stage-waterfall)").screenshot(), folder / "stages.webp")
    with watched_page(browser, url, Look("dark", 360)) as page:
        _ask(page, is_comparing=False)
        answer = page.locator("section[aria-labelledby=answer-title]")
        _save(answer.screenshot(), folder / "page-phone.webp")


def _ask(page: Page, *, is_comparing: bool) -> None:
    page.goto("/")
    page.get_by_role("button", name="use the sample clip").click()
    if is_comparing:
        page.get_by_label("Compare with a second setting").check()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#results")).to_be_visible()
    expect(page.locator(".strip img")).to_have_count(32)
    page.get_by_role("button", name="Frame 8 of 32").click()
    page.get_by_role("heading", name="Answer", exact=True).click()  # no button keeps the focus


def _save(png: bytes, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.open(io.BytesIO(png)).convert("RGB").save(path, quality=QUALITY, method=6)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    expect.set_options(timeout=PATIENCE_MS)
    with whole_service() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        take_all(browser, url, IMAGES)
        browser.close()


if __name__ == "__main__":
    main()
