"""One page of several processes: every sample has its process, and sums still add up."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from app.api.upkeep import metrics_page
from app.api.upkeep.metrics_page import MetricsPage, merge
from app.process_table import ProcessTable


def registry(number: float) -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("open", "Open {braces} here.", registry=registry).set(number)
    ends = Counter("ends", "Ends.", ["how"], registry=registry)
    ends.labels('by {"force"} = 1').inc(number)
    times = Histogram("times_s", "Times.", ["model"], buckets=(1, 5), registry=registry)
    times.labels("m").observe(number)
    return registry


def families(page: bytes) -> dict[str, Metric]:
    found = list(text_string_to_metric_families(page.decode()))
    assert len({family.name for family in found}) == len(found), "each is described once"
    return {family.name: family for family in found}


def values(page: bytes, sample: str) -> dict[str, float]:
    """By process."""
    return {
        s.labels["process"]: s.value
        for family in families(page).values()
        for s in family.samples
        if s.name == sample
    }


def test_merged_page_has_every_sample_under_its_process() -> None:
    page = merge({slot: generate_latest(registry(slot + 1)) for slot in (0, 2)})
    assert values(page, "open") == {"0": 1.0, "2": 3.0}
    assert values(page, "ends_total") == {"0": 1.0, "2": 3.0}
    assert values(page, "times_s_sum") == {"0": 1.0, "2": 3.0}
    found = families(page)
    assert {s.labels["how"] for s in found["ends"].samples} == {'by {"force"} = 1'}
    buckets = [s for s in found["times_s"].samples if s.name == "times_s_bucket"]
    assert [(s.labels["process"], s.labels["le"], s.value) for s in buckets] == [
        *(("0", "1.0", 1.0), ("0", "5.0", 1.0), ("0", "+Inf", 1.0)),
        *(("2", "1.0", 0.0), ("2", "5.0", 1.0), ("2", "+Inf", 1.0)),
    ]


@pytest.fixture
def pages(process_table: ProcessTable) -> Iterator[list[MetricsPage]]:
    yield [MetricsPage(registry(slot + 1), process_table.take_row(slot)) for slot in range(2)]


async def test_each_process_answers_for_both(pages: list[MetricsPage]) -> None:
    async with AsyncExitStack() as stack:
        for page in pages:
            await stack.enter_async_context(page.shown_to_siblings())
        for page in pages:
            rendered = await page.render()
            assert values(rendered, "open") == {"0": 1.0, "1": 2.0}
            assert values(rendered, "dycoke_api_process_up") == {"0": 1.0, "1": 1.0}


async def test_however_many_ask_pages_take_little_of_a_process(
    pages: list[MetricsPage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may ask for what costs every process milliseconds. Those who ask at a time share it,
    and who asks later gets a later one."""
    num_made = 0

    def counted(source: CollectorRegistry) -> bytes:
        nonlocal num_made
        num_made += 1
        return generate_latest(source)

    monkeypatch.setattr(metrics_page, "generate_latest", counted)
    monkeypatch.setattr(metrics_page, "FETCH_TIMEOUT_S", 20.0)
    async with AsyncExitStack() as stack:
        for page in pages:
            await stack.enter_async_context(page.shown_to_siblings())
        rendered = await asyncio.gather(*(page.render() for page in pages for _ in range(50)))
        assert len({values(page, "open")["1"] for page in rendered}) == 1
        assert num_made <= 8  # each its own, for itself and for the other, and about all
        before = num_made
        await pages[0].render()
        assert num_made > before


async def test_dead_process_shows_and_so_do_its_deaths(
    pages: list[MetricsPage], process_table: ProcessTable
) -> None:
    async with pages[1].shown_to_siblings():
        assert values(await pages[0].render(), "open") == {"0": 1.0, "1": 2.0}
    process_table.note_death(1)
    rendered = await pages[0].render()
    assert values(rendered, "open") == {"0": 1.0}
    assert values(rendered, "dycoke_api_process_up") == {"0": 1.0, "1": 0.0}
    assert values(rendered, "dycoke_api_process_deaths_total") == {"0": 0.0, "1": 1.0}
    async with pages[1].shown_to_siblings():  # another has come in its place
        assert values(await pages[0].render(), "open") == {"0": 1.0, "1": 2.0}


async def read_page(address: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        connection.connect(address)
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        try:
            async with asyncio.timeout(20):
                return await reader.read()
        finally:
            writer.close()


async def test_page_is_shown_to_processes_of_the_same_user_alone(
    pages: list[MetricsPage], process_table: ProcessTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody on the machine can find the socket, and a page may be for those with a key."""
    address, user = f"\0dycoke-{process_table.token}-0", os.geteuid()
    async with pages[0].shown_to_siblings():
        assert b"open 1.0" in await read_page(address)
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        assert await read_page(address) == b""


@pytest.mark.parametrize("says", [b"", b"x" * 100])
async def test_process_that_does_not_answer_keeps_nobody_waiting(
    pages: list[MetricsPage],
    process_table: ProcessTable,
    monkeypatch: pytest.MonkeyPatch,
    says: bytes,
) -> None:
    monkeypatch.setattr(metrics_page, "FETCH_TIMEOUT_S", 0.1 if not says else 20.0)
    monkeypatch.setattr(metrics_page, "MAX_PAGE_BYTES", 10)
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.bind(f"\0dycoke-{process_table.token}-1")
        stuck.listen()
        stuck.setblocking(False)
        rendering = asyncio.create_task(pages[0].render())
        if says:
            connection, _ = await asyncio.get_running_loop().sock_accept(stuck)
            with connection:
                connection.sendall(says)
                rendered = await rendering
        else:
            rendered = await rendering
    assert values(rendered, "open") == {"0": 1.0}
    assert values(rendered, "dycoke_api_process_up") == {"0": 1.0, "1": 0.0}
