"""Graphs by bucket: what is captured, what a replay runs, and what happens when a capture fails."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dycoke_core.engine.backends.cuda.graphs import (
    BUCKETS,
    DecodeGraphs,
    GraphKey,
    decode_keys,
)
from dycoke_core.engine.backends.cuda.tiles import LARGE_TILE, SMALL_TILE, choose_tile_rows


@dataclass
class FakeGraph:
    """Calls the captured function again, and writes its results over the first ones."""

    run: Callable[[], Any]
    outputs: Any

    def replay(self) -> None:
        self.outputs.copy_(self.run())


class FakeMaker:
    """Captures without a device; counts, and fails at the given capture."""

    def __init__(self, device: "FakeDevice") -> None:
        self._device = device

    def capture(self, run: Callable[[], Any]) -> FakeGraph:
        device = self._device
        device.num_captures += 1
        if device.num_captures == device.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        device.used_bytes += 10
        return FakeGraph(run, run())

    def wait(self) -> None:
        self._device.num_waits += 1
        if self._device.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def release(self) -> None:
        self._device.num_releases += 1

    def free_bytes(self) -> int:
        return 10_000 - self._device.used_bytes


@dataclass
class FakeDevice:
    fails_at: int | None = None
    is_lost: bool = False
    num_captures: int = 0
    num_waits: int = 0
    num_releases: int = 0
    used_bytes: int = 0

    def new_maker(self) -> FakeMaker:
        self.used_bytes = 0  # the graphs before are gone
        return FakeMaker(self)


class Step:
    """A step of static buffers: doubles each row's number; padding rows hold -1."""

    def __init__(self, max_rows: int) -> None:
        self.input = torch.full((max_rows,), -1.0)
        self.calls: list[GraphKey] = []

    def fill(self, *numbers: float) -> None:
        self.input.fill_(-1)
        self.input[: len(numbers)] = torch.tensor(numbers)

    def run(self, key: GraphKey) -> Tensor:
        self.calls.append(key)
        return 2 * self.input[: key.batch]


def keys(*batches: int) -> list[GraphKey]:
    return [GraphKey(batch, SMALL_TILE) for batch in batches]


def captured(device: FakeDevice, *batches: int) -> tuple[DecodeGraphs[Tensor], Step]:
    graphs: DecodeGraphs[Tensor] = DecodeGraphs(keys(*batches), device.new_maker)
    step = Step(max(batches))
    graphs.capture_all(step.run)
    step.calls.clear()
    return graphs, step


def test_a_batch_runs_in_the_smallest_bucket_that_holds_it() -> None:
    graphs, _ = captured(FakeDevice(), 1, 2, 4, 10)
    buckets = [graphs.bucket_for(rows) for rows in range(1, 11)]
    assert buckets == [1, 2, 4, 4, 10, 10, 10, 10, 10, 10]
    with pytest.raises(ValueError, match="11 rows exceed the largest bucket of 10"):
        graphs.bucket_for(11)


def test_a_replay_computes_from_what_the_buffers_hold_now() -> None:
    graphs, step = captured(FakeDevice(), 2, 4)
    places = set()
    for numbers in ((1.0, 2.0, 3.0), (7.0, 8.0, 9.0)):
        step.fill(*numbers)
        outputs = graphs.replay(GraphKey(4, SMALL_TILE))
        assert outputs.tolist() == [2 * number for number in numbers] + [-2.0]
        places.add(outputs.data_ptr())
    assert len(places) == 1, "outputs stay in place"
    assert not graphs.is_eager and set(step.calls) == {GraphKey(4, SMALL_TILE)}


def test_every_key_is_captured_once_and_the_largest_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device, step = FakeDevice(), Step(8)
    wanted = [*keys(1, 8, 4), GraphKey(8, LARGE_TILE)]
    graphs: DecodeGraphs[Tensor] = DecodeGraphs(wanted, device.new_maker)
    with caplog.at_level(logging.INFO):
        graphs.capture_all(step.run)
    assert step.calls == [GraphKey(8, LARGE_TILE), *keys(8, 4, 1)]
    assert "captured 4 of 4 decode graphs: 1 rows, tiles of 16" in caplog.messages
    (took,) = [m for m in caplog.messages if m.startswith("decode graphs took")]
    assert took.endswith("and 0 MiB")


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_capture_that_fails_leaves_all_steps_eager_and_says_why_once(
    fails_at: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = FakeDevice(fails_at=fails_at)
    graphs, _ = captured(device, 1, 2, 4)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "not permitted when stream is capturing" in warnings[0].getMessage()
    assert graphs.is_eager and device.num_captures == fails_at


def test_a_lost_device_is_no_failed_capture() -> None:
    device = FakeDevice(fails_at=2, is_lost=True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        captured(device, 1, 2)


def test_after_graphs_are_dropped_steps_are_eager_until_they_are_captured_again() -> None:
    device = FakeDevice()
    graphs, step = captured(device, 1, 2)
    num_releases = device.num_releases
    graphs.drop()
    assert graphs.is_eager and device.num_waits == 1
    assert device.num_releases == num_releases + 1
    graphs.capture_all(step.run)
    assert not graphs.is_eager and device.num_captures == 4
    step.fill(4.0)
    assert graphs.replay(GraphKey(1, SMALL_TILE)).tolist() == [8.0]


def test_dropping_twice_is_dropping_once() -> None:
    device = FakeDevice()
    graphs, _ = captured(device, 1)
    graphs.drop()
    graphs.drop()
    assert device.num_waits == 1


def test_a_later_capture_that_fails_stays_eager_and_the_next_one_that_works_does_not() -> None:
    device = FakeDevice(fails_at=4)
    graphs, step = captured(device, 1, 2)
    graphs.drop()
    graphs.capture_all(step.run)
    assert graphs.is_eager
    graphs.capture_all(step.run)
    assert not graphs.is_eager


@pytest.mark.parametrize("num_heads_per_group", [1, 4, 7, 8, 16, 17, 32])
@pytest.mark.parametrize("max_rows", [1, 3, 5, 64, 200, 256, 300])
def test_there_is_a_key_for_every_batch_and_every_tile_it_may_choose(
    max_rows: int, num_heads_per_group: int
) -> None:
    wanted = decode_keys(max_rows, num_heads_per_group)
    graphs: DecodeGraphs[Tensor] = DecodeGraphs(wanted, FakeDevice().new_maker)
    assert max(key.batch for key in wanted) == max_rows and len(set(wanted)) == len(wanted)
    for num_rows in range(1, max_rows + 1):
        for largest_group in {1, 2, 3, num_rows // 2, num_rows}:
            if 1 <= largest_group <= num_rows:
                tile_rows = choose_tile_rows([largest_group], num_heads_per_group)
                assert GraphKey(graphs.bucket_for(num_rows), tile_rows) in wanted


def test_the_usual_buckets_end_at_what_may_run() -> None:
    assert sorted({key.batch for key in decode_keys(256, 7)}) == list(BUCKETS)
    assert sorted({key.batch for key in decode_keys(20, 7)}) == [1, 2, 4, 8, 16, 20]
    assert decode_keys(2, 7) == keys(1, 2), "two rows fit a small tile"
