"""Every row of the page, with the bundled model and clip, in both schemes and at two widths."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from dycoke_core.tiny import CLIP
from tests.browser.axe import serious_findings
from tests.browser.watched import Look, watched_page

LIGHT = Look("light", 1280)


@pytest.fixture
def page(browser: Browser, service: str, either_look: Look) -> Iterator[Page]:
    with watched_page(browser, service, either_look) as page:
        yield page


def ask(page: Page, *, is_comparing: bool = False) -> None:
    """Asks about the sample clip, and waits for all that follows."""
    page.goto("/")
    page.get_by_role("button", name="use the sample clip").click()
    if is_comparing:
        page.get_by_label("Compare with a second setting").check()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#results")).to_be_visible()
    expect(page.locator(".strip img")).to_have_count(32)


def receipts(page: Page, url: str) -> list[dict[str, Any]]:
    """Of the jobs that the address names."""
    job_ids = page.evaluate("location.hash").removeprefix("#job=").split(",")
    return [httpx.get(f"{url}/v1/jobs/{job_id}").json()["result"] for job_id in job_ids]


def number_in(text: str | None) -> int:
    found = re.search(r"[\d,]+", text or "")
    assert found, text
    return int(found[0].replace(",", ""))


def kept_in_grid(page: Page) -> int:
    figures = page.locator("kept-view figure").all()
    return sum(int(figure.get_attribute("data-kept") or "") for figure in figures)


def brightness(canvas: Locator) -> float:
    """Mean of a painted frame, 0 to 255."""
    value: float = canvas.evaluate(
        """canvas => {
          const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return data.reduce((sum, x, i) => sum + (i % 4 == 3 ? 0 : x), 0) / data.length;
        }"""
    )
    return value


def test_every_row_of_the_page(browser: Browser, service: str, look: Look) -> None:
    with watched_page(browser, service, look) as page:
        ask(page, is_comparing=True)
        first, second = receipts(page, service)
        assert [first["compression"]["policy"], second["compression"]["policy"]] == [
            "dycoke",
            "full",
        ]
        answers = page.locator("run-answer")
        for answer, receipt in zip(answers.all(), (first, second), strict=True):
            expect(answer.locator("[data-part=answer]")).to_have_text(receipt["text"].strip())
            expect(answer.locator(".stages .is-done")).to_have_count(5)
            num_tokens = receipt["usage"]["completion_tokens"]
            books = answer.locator("[data-part=arrivals]")
            expect(books).to_have_text(f"{num_tokens} tokens arrived, each once and in order.")

        table = page.locator("receipt-table")
        for name in ("Time to first token", "Tokens of the answer", "FLOPs", "Keys and values"):
            expect(table.get_by_role("row", name=name)).to_be_visible()
        visual = table.get_by_role("row", name="Visual tokens in the prompt").locator("td")
        assert [number_in(visual.nth(i).text_content()) for i in (0, 1)] == [
            receipt["compression"]["visual_tokens_prefill"] for receipt in (first, second)
        ]
        expect(page.locator("answer-diff")).to_be_visible()

        expect(page.locator("stage-waterfall tbody tr")).to_have_count(8)
        page.get_by_text("More settings").click()
        page.get_by_text("Stage II").click()
        expect(page.locator("kept-view .legend")).to_contain_text("attended to")
        assert page.evaluate("document.documentElement.scrollWidth") <= look.width
        assert serious_findings(page) == []


def test_click_and_arrow_keys_on_the_strip_seek(page: Page, service: str) -> None:
    ask(page)
    (receipt,) = receipts(page, service)
    times = receipt["frames"]["timestamps_s"]
    video = page.locator("video")
    expect(page.locator(".strip button")).to_have_count(len(times))

    def expect_place(index: int) -> None:
        button = page.locator(".strip button").nth(index)
        expect(button).to_have_attribute("aria-current", "true")
        assert abs(video.evaluate("video => video.currentTime") - times[index]) < 0.01

    page.get_by_role("button", name="Frame 9 of 32").click()
    expect_place(8)
    page.keyboard.press("ArrowRight")
    expect_place(9)
    expect(page.get_by_role("button", name="Frame 10 of 32")).to_be_focused()
    page.keyboard.press("End")
    expect_place(31)
    page.keyboard.press("ArrowRight")
    expect_place(31)
    page.keyboard.press("Home")
    expect_place(0)


def test_what_the_model_saw_is_what_the_receipt_says(page: Page, service: str) -> None:
    ask(page)
    (receipt,) = receipts(page, service)
    compression = receipt["compression"]
    view = page.locator("kept-view")
    expect(view.locator("figure")).to_have_count(32)
    kept = [int(f.get_attribute("data-kept") or "") for f in view.locator("figure").all()]
    assert kept == compression["kept_per_frame"]
    legend = view.locator(".legend")
    expect(legend).to_contain_text(f"{compression['visual_tokens_prefill']} kept")
    # The first frame of a window stays whole, the next one lost most of the same picture.
    canvases = view.locator("canvas")
    assert brightness(canvases.nth(0)) > 1.5 * brightness(canvases.nth(1)) > 0

    view.get_by_text("Stage II").click()
    expect(legend).to_contain_text(f"{compression['visual_tokens_decode']} attended to")
    assert kept_in_grid(page) == compression["visual_tokens_decode"]
    slider = view.get_by_role("slider", name="At token")
    slider.press("Home")
    expect(legend).to_contain_text("Stage II hid nothing from this token")
    assert kept_in_grid(page) == compression["visual_tokens_prefill"]
    slider.press("ArrowRight")
    expect(legend).to_contain_text(f"{compression['visual_tokens_decode']} attended to")
    expect(view.locator("output")).to_contain_text("2 of ")


def test_receipt_without_a_mask_is_shown_all_the_same(page: Page) -> None:
    page.goto("/")
    page.get_by_text("More settings").click()
    page.get_by_label("Record which tokens the model kept").uncheck()
    page.get_by_role("button", name="use the sample clip").click()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("kept-view")).to_contain_text("does not say which tokens were kept")


def test_clip_can_be_chosen_and_dropped(page: Page) -> None:
    page.goto("/")
    submit = page.get_by_role("button", name="Ask", exact=True)
    expect(submit).to_be_disabled()
    page.get_by_label("Choose a clip").set_input_files(CLIP)
    expect(page.locator("clip-picker")).to_contain_text("shapes.mp4: h264, 224")
    expect(submit).to_be_enabled()
    page.reload()
    page.evaluate(
        """async () => {
          const transfer = new DataTransfer();
          const clip = await (await fetch("/sample.mp4")).blob();
          transfer.items.add(new File([clip], "dropped.mp4"));
          const zone = document.querySelector(".drop-zone");
          zone.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
        }"""
    )
    expect(page.locator("clip-picker")).to_contain_text("dropped.mp4: h264")
    expect(submit).to_be_enabled()


def test_answers_differ_word_by_word(page: Page) -> None:
    page.goto("/")
    page.evaluate(
        """async () => {
          await import("/page/js/answer-diff.js");
          const element = document.createElement("answer-diff");
          document.body.append(element);
          element.show("a red circle moves", "a blue circle moves fast");
        }"""
    )
    shown = page.locator("body > answer-diff")
    expect(shown.locator("del")).to_have_text("red")
    expect(shown.locator("ins")).to_have_text(["blue", "fast"])


def test_question_can_be_copied_for_elsewhere(page: Page, service: str) -> None:
    ask(page)
    (receipt,) = receipts(page, service)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    box = page.locator("copy-as")
    needed = {
        "curl": "curl -N",
        "Python": "import httpx",
        "openai-python": "from openai import OpenAI",
    }
    for name, start in needed.items():
        box.get_by_text(name, exact=True).click()
        box.get_by_role("button", name="Copy", exact=True).click()
        expect(box).to_contain_text("Copied.")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert start in copied and receipt["video_id"] in copied
        assert run(["bash", "-c"] if name == "curl" else [sys.executable, "-c"], copied)


def run(interpreter: list[str], copied: str) -> str:
    """What it prints for someone who pastes it."""
    environment = {**os.environ, "DYCOKE_API_KEY": "none"}
    done = subprocess.run(
        [*interpreter, copied], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "dycoke" in done.stdout, "the compression that was asked for"
    return done.stdout


def test_link_to_a_job_shows_its_answer_again(page: Page, browser: Browser, service: str) -> None:
    ask(page)
    (receipt,) = receipts(page, service)
    with watched_page(browser, service, LIGHT) as other:
        other.goto(page.url)
        expect(other.locator("[data-part=answer]")).to_have_text(receipt["text"].strip())
        expect(other.locator("#question-asked")).to_have_text("What happens in the video?")
        expect(other.locator(".strip img")).to_have_count(32)
        expect(other.locator("kept-view figure")).to_have_count(32)


def test_screen_readers_are_given_sentences(page: Page, service: str) -> None:
    ask(page)
    (receipt,) = receipts(page, service)
    log = page.get_by_role("log")
    sentences = [text.strip() for text in log.locator("p").all_text_contents()]
    assert " ".join(sentences) == receipt["text"].strip()
    assert len(sentences) > 1 and all(sentence.endswith(".") for sentence in sentences)


def test_what_is_no_video_is_refused_with_a_reason(
    browser: Browser, service: str, tmp_path: Path
) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("not a video")
    with watched_page(browser, service, LIGHT, tolerated="status of 415") as page:
        page.goto("/")
        page.get_by_label("Choose a clip").set_input_files(path)
        expect(page.locator("clip-picker .is-error")).to_contain_text("notes.mp4: ")
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_disabled()


def test_docs_work_without_another_host(browser: Browser, service: str) -> None:
    with watched_page(browser, service, LIGHT) as page:
        page.goto("/docs")
        expect(page.locator("#operations-chat-chat_v1_video_chat_post")).to_be_visible()
        page.locator("#operations-chat-chat_v1_video_chat_post button").first.click()
        expect(page.get_by_text("multipart/form-data").first).to_be_attached()
