"""The page of a service with two models: which one answers, and what each of them saw."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.axe import serious_findings
from tests.browser.watched import Look, watched_page
from tests.video_clips import make_clip

NUM_FRAMES = 7  # the last unit of two lacks one
MIN_BRIGHT = 60  # of a token's frame, else it says nothing of how bright it is painted


@pytest.fixture
def page(browser: Browser, two_models: str) -> Iterator[Page]:
    with watched_page(browser, two_models, Look("dark", 360)) as page:
        yield page


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "wide.mp4"
    return make_clip(path, num_frames=20, width=320, height=180)


def ask(page: Page, url: str, clip: Path, model: str) -> dict[str, Any]:
    """The receipt of a question that is asked as a person would ask it."""
    page.goto("/")
    page.get_by_label("Choose a clip").set_input_files(clip)
    page.get_by_role("combobox", name="Model").select_option(model)
    page.get_by_text("More settings").click()
    page.get_by_label("number of frames").fill(str(NUM_FRAMES))
    page.get_by_label("max tokens").fill("6")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#results")).to_be_visible()
    expect(page.locator(".strip img")).to_have_count(NUM_FRAMES)
    job_id = page.evaluate("location.hash").removeprefix("#job=")
    receipt: dict[str, Any] = httpx.get(f"{url}/v1/jobs/{job_id}").json()["result"]
    return receipt


def pixels_of(canvas: Locator) -> np.ndarray:
    png = canvas.evaluate("canvas => canvas.toDataURL('image/png')").split(",")[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), np.float64)


def frame_of(url: str, receipt: dict[str, Any], index: int) -> np.ndarray:
    path = f"{url}/v1/videos/{receipt['video_id']}/frames/{index}?job_id={receipt['job_id']}"
    png = httpx.get(path).raise_for_status().content
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.float64)


def means_by_token(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[rows, columns]."""
    height, width, _ = pixels.shape
    cells = pixels.reshape(rows, height // rows, columns, width // columns, 3)
    return cells.mean(axis=(1, 3, 4))


def test_each_model_is_offered_and_says_that_it_answered(
    page: Page, two_models: str, clip: Path
) -> None:
    for model, num_units in (("gemma3", 7), ("qwen3-vl", 4)):
        receipt = ask(page, two_models, clip, model)
        assert receipt["model"] == model
        expect(page.locator("receipt-table")).to_contain_text(f"A: {model}, ")
        expect(page.locator("kept-view figure")).to_have_count(num_units)
        expect(page.locator("copy-as code")).to_contain_text(f'"model": "{model}"')
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert serious_findings(page) == []


def test_tokens_are_painted_where_a_model_of_any_shape_saw_them(
    page: Page, two_models: str, clip: Path
) -> None:
    receipt = ask(page, two_models, clip, "qwen3-vl")
    compression = receipt["compression"]
    rows, columns = compression["rows"], compression["columns"]
    assert (compression["units"], rows, columns) == (4, 6, 10)
    figures = page.locator("kept-view figure").all()
    kept = [int(figure.get_attribute("data-kept") or "") for figure in figures]
    assert kept == compression["kept_per_frame"]

    bits = np.frombuffer(base64.b64decode(receipt["kept_mask"]["stage1"]), np.uint8)
    masks = np.unpackbits(bits, count=4 * rows * columns).reshape(4, rows, columns) == 1
    num_seen = 0
    for unit, (figure, mask) in enumerate(zip(figures, masks, strict=True)):
        canvas = figure.locator("canvas")
        frame = means_by_token(frame_of(two_models, receipt, 2 * unit), rows, columns)
        expect(canvas).to_have_attribute("width", str(receipt["frames"]["width"]))
        painted = means_by_token(pixels_of(canvas), rows, columns)
        can_tell = frame > MIN_BRIGHT
        num_seen += int(can_tell.sum())
        assert ((painted > 0.6 * frame) == mask)[can_tell].all()
    assert num_seen > rows * columns


def test_units_are_labelled_with_the_times_of_their_frames(
    page: Page, two_models: str, clip: Path
) -> None:
    times = ask(page, two_models, clip, "qwen3-vl")["frames"]["timestamps_s"]
    said = [f"0:{time:05.2f}" for time in times]
    labels = [
        canvas.get_attribute("aria-label") or ""
        for canvas in page.locator("kept-view canvas").all()
    ]
    assert [label.split(" of the ")[1] for label in labels] == [
        f"frames at {said[0]} and {said[1]}",
        f"frames at {said[2]} and {said[3]}",
        f"frames at {said[4]} and {said[5]}",
        f"frame at {said[6]}",
    ]
