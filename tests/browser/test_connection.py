"""Jobs that take their time: the queue, cancelling, losing the connection. The worker is fake."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from dycoke_core.tiny import CLIP
from tests.browser.axe import serious_findings
from tests.browser.watched import Look, watched_page

LIGHT = Look("light", 1280)
SLOW = "sleep:0.25"


@pytest.fixture
def page(browser: Browser, slow_url: str, either_look: Look) -> Iterator[Page]:
    with watched_page(browser, slow_url, either_look) as page:
        page.goto("/")
        page.get_by_role("button", name="use the sample clip").click()
        yield page


def ask(page: Page, question: str, max_tokens: int) -> None:
    page.get_by_label("Question about the clip").fill(question)
    page.get_by_text("More settings").click()
    page.get_by_label("max tokens").fill(str(max_tokens))
    page.get_by_role("button", name="Ask", exact=True).click()


@contextmanager
def busy_worker(url: str) -> Iterator[None]:
    """Someone else's job, which runs for as long as the block."""
    with CLIP.open("rb") as file:
        video = httpx.post(f"{url}/v1/videos", files={"video": file}, timeout=60).json()
    fields = {
        "video_id": video["video_id"],
        "question": SLOW,
        "max_tokens": 4000,
        "on_disconnect": "continue",
    }
    with httpx.stream("POST", f"{url}/v1/video/chat", json=fields, timeout=60) as response:
        job_id = response.headers["X-Job-Id"]
        for line in response.iter_lines():
            if line == "event: token":
                break
    yield
    httpx.delete(f"{url}/v1/jobs/{job_id}", timeout=60).raise_for_status()


def test_place_in_the_queue_is_shown(page: Page, slow_url: str) -> None:
    answer = page.locator("run-answer")
    with busy_worker(slow_url):
        ask(page, "Who is next?", 3)
        expect(answer).to_contain_text("In the queue: next")
        expect(answer.locator("[aria-current=step]")).to_have_text("Queue")
        expect(answer.get_by_role("button", name="Cancel")).to_be_visible()
    expect(answer).to_have_attribute("data-outcome", "done")
    expect(answer).to_contain_text("3 tokens arrived, each once and in order.")


def test_cancel_ends_the_job(page: Page) -> None:
    ask(page, SLOW, 4000)
    answer = page.locator("run-answer")
    expect(answer.locator("[data-part=answer]")).to_contain_text("w")
    assert serious_findings(page) == [], "while it runs"
    answer.get_by_role("button", name="Cancel").click()
    expect(answer).to_have_attribute("data-outcome", "error")
    assert serious_findings(page) == [], "with an error"
    expect(answer).to_contain_text("(cancelled)")
    expect(page.locator("#results")).to_be_hidden()
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()


def test_nothing_is_lost_with_the_connection(page: Page) -> None:
    ask(page, SLOW, 24)
    answer = page.locator("run-answer")
    expect(answer.locator("[data-part=answer]")).to_contain_text("w")
    answer.get_by_role("button", name="Lose the connection").click()
    expect(answer).to_have_attribute("data-connection", "lost")
    expect(answer).to_contain_text("had arrived by then")
    answer.get_by_role("button", name="Resume").click()
    expect(answer).to_have_attribute("data-outcome", "done")
    expect(answer).to_contain_text("24 tokens arrived over 2 connections, each once and in order.")
    assert len((answer.locator("[data-part=answer]").text_content() or "").split()) == 24
    expect(page.locator("#results")).to_be_visible()


def test_page_can_be_loaded_again_in_mid_answer(page: Page) -> None:
    ask(page, SLOW, 24)
    answer = page.locator("run-answer")
    expect(answer.locator("[data-part=answer]")).to_contain_text("w")
    page.reload()
    expect(answer).to_contain_text("24 tokens arrived, each once and in order.")
    expect(page.locator("#question-asked")).to_have_text(SLOW)
    expect(answer.locator("h3")).to_contain_text("dycoke")


def test_lost_job_can_still_be_cancelled(page: Page) -> None:
    ask(page, SLOW, 4000)
    answer = page.locator("run-answer")
    answer.get_by_role("button", name="Lose the connection").click()
    answer.get_by_role("button", name="Cancel").click()
    expect(answer).to_contain_text("(cancelled)")


def test_questions_are_text_and_never_markup(page: Page) -> None:
    question = "<img src=x onerror=alert(1)> <b>bold</b>"
    ask(page, question, 2)
    expect(page.locator("#question-asked")).to_have_text(question)
    expect(page.locator("#question-asked *")).to_have_count(0)
    expect(page.locator("copy-as code")).to_contain_text("onerror")
    expect(page.locator("copy-as code *")).to_have_count(0)


def test_link_to_a_job_that_is_gone_says_so(browser: Browser, slow_url: str) -> None:
    with watched_page(browser, slow_url, LIGHT, tolerated="status of 404") as page:
        page.goto("/#job=gone")
        expect(page.locator("#answers")).to_contain_text("Job gone: no job of yours has this id")


def test_event_source_reads_a_job_to_its_end(page: Page) -> None:
    ask(page, "How does it end?", 5)
    expect(page.locator("#results")).to_be_visible()
    seen = page.evaluate(
        """jobId => new Promise((resolve) => {
          const seen = [];
          const source = new EventSource(`/v1/jobs/${jobId}/events`);
          for (const type of ["job", "token", "done"])
            source.addEventListener(type, (event) => {
              seen.push(type);
              if (type === "done") { source.close(); resolve(seen); }
            });
        })""",
        page.evaluate("location.hash").removeprefix("#job="),
    )
    assert (seen[0], seen[-1]) == ("job", "done") and set(seen[1:-1]) == {"token"}
