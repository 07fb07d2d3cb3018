"""A step's numbers arrive as they were written, and no buffer is reused before it was copied."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from dycoke_core.engine.backends.cuda.staging import (
    DeviceStep,
    HostStep,
    ResultDownloads,
    StepLayout,
    StepUploads,
)
from dycoke_core.engine.backends.cuda.tiles import (
    TileCapacity,
    TileRows,
    TileShape,
    plan_tiles,
)
from dycoke_core.gpu_kernels.rows import NO_LAYER, ROW_COLUMNS, SCORING_LAYER, WRITE_SLOT

CPU = torch.device("cpu")
SHAPE = TileShape(tile_rows=16, num_heads_per_group=7, num_kv_heads=4, num_layers=6)
NAMES = tuple(StepLayout(1, TileCapacity(1, 1, 1)).sections)


def layout_of(batch: int, num_axes: int = 1) -> StepLayout:
    return StepLayout(batch, TileCapacity.for_batch(batch, 1000, SHAPE), num_axes)


def fill(step: HostStep, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name in NAMES:
        array = getattr(step, name)
        if array.dtype.kind == "f":
            array[...] = rng.random(array.shape)
        else:
            array[...] = rng.integers(-(2**31), 2**31 - 1, array.shape)


def assert_filled(step: DeviceStep, layout: StepLayout, seed: int) -> None:
    expected = layout.on_host(torch.zeros(layout.num_words, dtype=torch.int32))
    fill(expected, seed)
    for name in NAMES:
        assert np.array_equal(getattr(step, name).numpy(), getattr(expected, name)), name


class FakeEvent:
    """Records what was asked of it, in a list that all events share."""

    log: list[tuple[int, str]]

    def __init__(self, number: int) -> None:
        self.number = number

    def record(self) -> None:
        self.log.append((self.number, "record"))

    def synchronize(self) -> None:
        self.log.append((self.number, "wait"))


class EventMaker:
    def __init__(self) -> None:
        self.log: list[tuple[int, str]] = []
        self.count = 0

    def __call__(self) -> FakeEvent:
        event = FakeEvent(self.count)
        event.log = self.log
        self.count += 1
        return event


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("num_axes", [1, 3])
def test_all_numbers_of_a_step_arrive(batch: int, num_axes: int) -> None:
    layout = layout_of(batch, num_axes)
    uploads = StepUploads(layout.num_words, CPU, depth=1)
    fill(uploads.begin(layout), seed=batch)
    assert_filled(uploads.send(layout), layout, seed=batch)


def test_sections_are_aligned_and_do_not_overlap() -> None:
    for batch in range(1, 40):
        sections = list(layout_of(batch).sections.values())
        assert all(section.first_word % 4 == 0 for section in sections)
        for before, after in pairwise(sections):
            assert before.first_word + before.num_words <= after.first_word


def test_both_sides_have_the_shapes_and_types_that_the_kernels_want() -> None:
    layout = layout_of(3)
    uploads = StepUploads(layout.num_words, CPU, depth=0)
    step = uploads.device_step(layout)
    assert step.rows.shape == (3, ROW_COLUMNS) and step.first.shape == (2, 4)
    assert step.items.shape == (layout.capacity.items, 8)
    assert step.num_items.shape == (1,) and step.parts.shape == (layout.capacity.parts,)
    assert step.positions.shape == (1, 3) and step.positions.dtype == torch.int64
    assert step.uniforms.dtype == torch.float64
    assert step.temperature.dtype == step.top_p.dtype == torch.float32
    host = uploads.begin(layout)
    for name in NAMES:
        ours, theirs = getattr(host, name), getattr(step, name)
        assert ours.shape == theirs.shape and torch.from_numpy(ours).dtype == theirs.dtype
        assert theirs.is_contiguous() and theirs.data_ptr() % 16 == 0


def test_steps_of_every_layout_lie_at_the_same_place_each_time() -> None:
    layouts = [layout_of(batch) for batch in (1, 4, 8)]
    uploads = StepUploads(max(layout.num_words for layout in layouts), CPU, depth=1)
    places = {layout: uploads.device_step(layout).rows.data_ptr() for layout in layouts}
    for seed in range(9):
        layout = layouts[seed % 3]
        fill(uploads.begin(layout), seed)
        step = uploads.send(layout)
        assert step.rows.data_ptr() == places[layout]
        assert_filled(step, layout, seed)


def test_a_host_buffer_is_filled_only_when_its_last_copy_is_done() -> None:
    events = EventMaker()
    layout = layout_of(2)
    uploads = StepUploads(layout.num_words, CPU, depth=1, new_event=events)
    for _ in range(3):
        uploads.begin(layout)
        uploads.send(layout)
    assert events.count == 2
    assert events.log == [
        *((0, "wait"), (0, "record")),  # waiting for what was never recorded costs nothing
        *((1, "wait"), (1, "record")),
        *((0, "wait"), (0, "record")),
    ]


def test_the_step_in_flight_is_not_the_one_being_filled() -> None:
    layout = layout_of(2)
    uploads = StepUploads(layout.num_words, CPU, depth=1)
    first = uploads.begin(layout)
    uploads.send(layout)
    assert not np.shares_memory(first.rows, uploads.begin(layout).rows)


def test_padding_rows_do_nothing() -> None:
    layout = layout_of(4)
    uploads = StepUploads(layout.num_words, CPU, depth=0)
    step = uploads.begin(layout)
    fill(step, seed=1)
    real = step.rows[:2].copy()
    step.pad(2, trash_slot=77)
    assert np.array_equal(step.rows[:2], real)
    expected = np.zeros((2, ROW_COLUMNS), np.int32)
    expected[:, WRITE_SLOT], expected[:, SCORING_LAYER] = 77, NO_LAYER
    assert np.array_equal(step.rows[2:], expected)
    assert not step.positions[:, 2:].any() and not step.temperature[2:].any()
    assert (step.top_p[2:] == 1).all() and not step.uniforms[2:].any()


def test_tiles_are_written_straight_into_a_step() -> None:
    layout = layout_of(4)
    rows = TileRows(*(np.array([value, value]) for value in (0, 500, 3, 600, 20, 7)))
    tiles = plan_tiles(rows, SHAPE, layout.capacity)
    uploads = StepUploads(layout.num_words, CPU, depth=1)
    tiles.write(uploads.begin(layout))
    step = uploads.send(layout)
    assert step.num_items.item() == len(tiles.items)
    assert np.array_equal(step.items[: len(tiles.items)].numpy(), tiles.items)


def test_results_are_those_of_their_own_step() -> None:
    downloads = ResultDownloads(8, CPU, depth=1)
    on_device = torch.zeros(3, 4, dtype=torch.int32)  # static: each step overwrites it
    pending = []
    for step in range(4):
        on_device.copy_(torch.arange(12).view(3, 4) + 100 * step)
        pending.append(downloads.start(on_device))
    for step, download in enumerate(pending):
        results = download.read()
        assert results.ids.tolist() == [100 * step + i for i in range(4)]
        assert results.flags.tolist() == [100 * step + 4 + i for i in range(4)]
        assert results.refreshes.tolist() == [100 * step + 8 + i for i in range(4)]
        assert download.read() is results


def test_reading_waits_for_its_own_copy_alone() -> None:
    events = EventMaker()
    downloads = ResultDownloads(8, CPU, depth=1, new_event=events)
    results = torch.zeros(3, 2, dtype=torch.int32)
    first, _second = downloads.start(results), downloads.start(results)
    first.read()
    assert events.log == [(0, "record"), (1, "record"), (0, "wait")]


def test_results_that_nobody_read_are_kept_when_their_memory_is_taken() -> None:
    events = EventMaker()
    downloads = ResultDownloads(8, CPU, depth=0, new_event=events)
    first = downloads.start(torch.full((3, 8), 1, dtype=torch.int32))
    downloads.start(torch.full((3, 1), 2, dtype=torch.int32))
    assert events.log == [(0, "record"), (0, "wait"), (0, "record")]
    assert first.read().ids.tolist() == [1] * 8
