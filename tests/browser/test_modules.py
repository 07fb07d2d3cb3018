"""The page's modules that only compute, in the browser that runs them."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.watched import Look, watched_page


@pytest.fixture
def page(browser: Browser, slow_url: str) -> Iterator[Page]:
    with watched_page(browser, slow_url, Look("light", 1280)) as page:
        page.goto("/")
        yield page


def call(page: Page, module: str, body: str, argument: Any = None) -> Any:
    """Runs a function's body with a module as `m` and an argument as `x`."""
    source = f"async (x) => {{ const m = await import('/page/js/{module}.js'); {body} }}"
    return page.evaluate(source, argument)


def test_events_are_whole_however_they_are_cut(page: Page) -> None:
    stream = (
        'event: job\nid: 0-1\ndata: {"a":1}\n\n: heartbeat\n\n'
        'event: token\nid: 1-0\ndata: {"text":"a: b\\n"}\n\nevent: status\ndata: {}\n\nevent: x'
    )
    whole = [
        {"type": "job", "id": "0-1", "data": {"a": 1}},
        {"type": "token", "id": "1-0", "data": {"text": "a: b\n"}},
        {"type": "status", "id": None, "data": {}},
    ]
    cuts = call(
        page,
        "sse",
        """return Array.from({length: x.length}, (_, cut) => {
          const parser = new m.EventParser();
          return [...parser.push(x.slice(0, cut)), ...parser.push(x.slice(cut))];
        });""",
        stream,
    )
    assert len(cuts) == len(stream) and all(events == whole for events in cuts)


def test_bit_sets_are_read_highest_bit_first(page: Page) -> None:
    # Two units of five tokens: 10110 01000, then six bits of padding.
    mask = {"units": 2, "tokens_per_unit": 5, "rows": 1, "columns": 5}
    mask |= {"stage1": "sgA=", "stage2": "ggA="}  # 1011001000, 1000001000
    fates = "return m.fates(x, 'stage1').map((unit) => [...unit])"
    assert call(page, "kept-bits", fates, mask) == [[2, 0, 2, 2, 0], [0, 2, 0, 0, 0]]
    fates = fates.replace("stage1", "stage2")
    assert call(page, "kept-bits", fates, mask) == [[2, 0, 1, 1, 0], [0, 2, 0, 0, 0]]
    assert call(page, "kept-bits", fates, {**mask, "stage2": None})[0] == [2, 0, 2, 2, 0]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("a b c", "a b c", [("same", "a b c")]),
        ("a b c", "a x c", [("same", "a"), ("removed", "b"), ("added", "x"), ("same", "c")]),
        ("", "a", [("added", "a")]),
        ("a b", "", [("removed", "a b")]),
        ("", "", []),
    ],
)
def test_word_diff(page: Page, before: str, after: str, expected: list[tuple[str, str]]) -> None:
    pieces = call(page, "word-diff", "return m.wordDiff(...x)", [before, after])
    assert [(piece["kind"], piece["text"]) for piece in pieces] == expected


def test_books_tell_what_is_missing_and_what_came_twice(page: Page) -> None:
    body = """const arrivals = new m.Arrivals();
    for (const [index, text, num] of x.tokens)
      arrivals.add({index, text, token_ids: Array(num).fill(7)});
    return [arrivals.numMissing, arrivals.numRepeated, arrivals.areWhole({text: x.text})];"""
    several = {"tokens": [[0, "a ", 1], [1, "b c ", 2], [3, "", 0]], "text": "a b c "}
    assert call(page, "run", body, several) == [0, 0, True]
    assert call(page, "run", body, {**several, "text": "a b"}) == [0, 0, False]
    missing = {"tokens": [[0, "a ", 1], [2, "c ", 1]], "text": "a c "}
    assert call(page, "run", body, missing) == [1, 0, False]
    twice = {"tokens": [[0, "a ", 1], [0, "a ", 1]], "text": "a a "}
    assert call(page, "run", body, twice) == [0, 1, False]


def test_sentences_come_when_they_are_complete(page: Page) -> None:
    body = """const sentences = new m.Sentences();
    return [...x.map((text) => sentences.add(text)), sentences.flush()];"""
    pieces = ["It costs", " 1.5 eu", "ros. Then", " it", " stops! Why", "?"]
    expected = [[], [], ["It costs 1.5 euros."], [], ["Then it stops!"], [], ["Why?"]]
    assert call(page, "sentences", body, pieces) == expected


@pytest.mark.parametrize(("models", "is_asked"), [(["one"], False), (["one", "other"], True)])
def test_of_several_models_one_is_chosen(page: Page, models: list[str], is_asked: bool) -> None:
    body = """const form = new m.AskForm();
    document.body.append(form);
    form.offer({default: {policy: 'full'}, policies: {full: []}}, x);
    form.isReady = true;
    const asked = new Promise((resolve) =>
      form.addEventListener('ask', ({detail}) => resolve(detail.options.model)));
    const select = form.querySelector('#asked-model');
    select.value = x.at(-1);
    form.querySelector('form').requestSubmit();
    return [!select.parentElement.hidden, await asked];"""
    assert call(page, "ask-form", body, models) == [is_asked, models[-1]]
