"""The page of a service that has API keys."""

from playwright.sync_api import Browser, Page, expect

from tests.browser.axe import serious_findings
from tests.browser.conftest import KEY
from tests.browser.watched import Look, watched_page


def give_key(page: Page, key: str) -> None:
    page.get_by_label("API key", exact=True).fill(key)
    page.get_by_role("button", name="Use it").click()


def test_key_is_asked_for_and_kept_for_the_tab(browser: Browser, keyed_service: str) -> None:
    with watched_page(browser, keyed_service, Look("light", 360)) as page:
        page.goto("/")
        expect(page.locator("main")).to_be_hidden()
        assert serious_findings(page) == []
        give_key(page, KEY)
        page.get_by_role("button", name="use the sample clip").click()
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator(".strip img")).to_have_count(32)
        source = page.locator("video").get_attribute("src") or ""
        assert "signature=" in source and KEY not in source
        page.reload()
        expect(page.locator("#results")).to_be_visible()
        kept = "({...localStorage, cookie: document.cookie, url: location.href})"
        assert KEY not in str(page.evaluate(kept))
        address = page.url
        page.get_by_role("button", name="Forget the API key").click()
        expect(page.get_by_label("API key", exact=True)).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
    with watched_page(browser, keyed_service, Look("dark", 1280)) as other:
        other.goto(address)
        expect(other.get_by_label("API key", exact=True)).to_be_visible()


def test_wrong_key_is_refused_with_a_reason(browser: Browser, keyed_service: str) -> None:
    look = Look("light", 1280)
    with watched_page(browser, keyed_service, look, tolerated="status of 401") as page:
        page.goto("/")
        give_key(page, "x" * 32)
        expect(page.locator("key-form")).to_contain_text("the API key is not valid")
        give_key(page, KEY)
        expect(page.get_by_role("button", name="use the sample clip")).to_be_visible()
