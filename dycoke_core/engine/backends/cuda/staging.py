"""What a step sends to the device, in one copy, and what the host reads back of it, in another.

All integers and numbers of a step lie in one int32 buffer: `StepLayout` says where, the same on
both sides, so that graphs which were captured on the device's buffer find the next step's numbers
in the same places. Host buffers are pinned, so that copies run beside the host, and there is one
more of them than steps in flight. Each is guarded by an event: it is filled again only once the
device has copied it.

The device's buffer is one for all steps: a step's copy and its work are queued on one stream, so
the next copy waits for the work before. Copies go to the stream that is current at the call.

Knows nothing of what it carries except the values that make a row padding. Filling, copying and
reading back 256 rows costs the host 0.03 ms, without the calls to the device. On a CPU, where tests
run, both sides are plain memory and nothing is waited for.

What is not covered: several streams; copies that only take what has changed, as a step of 256 rows
is 0.1 MB.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dycoke_core import transfer
from dycoke_core.engine.backends.cuda.tiles import TileBuffers, TileCapacity
from dycoke_core.gpu_kernels.rows import (
    ITEM_COLUMNS,
    NO_LAYER,
    ROW_COLUMNS,
    SCORING_LAYER,
    WRITE_SLOT,
)

Int32s = npt.NDArray[np.int32]

_OF_WINDOWS = "windows_"
_ALIGNED_WORDS = 4  # sections begin at multiples of 16 bytes, as Triton likes its pointers


class Event(Protocol):
    """torch.cuda.Event, as far as it is needed."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class _NoEvent:
    """Of a CPU, whose copies are done when they return."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@dataclass(frozen=True, eq=False)
class HostStep(TileBuffers):
    """A step's numbers where the host writes them. Some come from `TileBuffers`."""

    rows: Int32s  # [B, ROW_COLUMNS]
    positions: npt.NDArray[np.int64]  # [axes, B]
    uniforms: npt.NDArray[np.float64]  # [B], in [0, 1)
    temperature: npt.NDArray[np.float32]  # [B]
    top_p: npt.NDArray[np.float32]  # [B]
    windows: TileBuffers | None  # of layers that have one

    def pad(self, num_rows: int, trash_slot: int) -> None:
        """Makes the bucket's rows from `num_rows` on padding: the null seat's, which do nothing."""
        self.rows[num_rows:] = 0
        self.rows[num_rows:, WRITE_SLOT] = trash_slot
        self.rows[num_rows:, SCORING_LAYER] = NO_LAYER
        self.positions[:, num_rows:] = 0
        self.uniforms[num_rows:] = 0
        self.temperature[num_rows:] = 0
        self.top_p[num_rows:] = 1


@dataclass(frozen=True, eq=False)
class DeviceTiles:
    """What a step's attention reads: views that stay in place."""

    items: Tensor  # int32 [cap, ITEM_COLUMNS]
    num_items: Tensor  # int32 [1]
    parts: Tensor  # int32 [cap]
    first: Tensor  # int32 [2, B + 1]


@dataclass(frozen=True, eq=False)
class DeviceStep(DeviceTiles):
    """The same step on the device."""

    rows: Tensor  # int32 [B, ROW_COLUMNS]
    positions: Tensor  # int64 [axes, B]
    uniforms: Tensor  # float64 [B]
    temperature: Tensor  # float32 [B]
    top_p: Tensor  # float32 [B]
    windows: DeviceTiles | None


@dataclass(frozen=True)
class StepLayout:
    """Where a bucket's numbers lie, in words of an int32 buffer."""

    num_rows: int  # B, of the bucket
    capacity: TileCapacity
    num_axes: int = 1  # of positions
    has_windows: bool = False

    @cached_property
    def sections(self) -> dict[str, "_Section"]:
        batch, words = self.num_rows, 0
        sections = {}
        tiles: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "first": ((2, batch + 1), torch.int32),
            "num_items": ((1,), torch.int32),
            "parts": ((self.capacity.parts,), torch.int32),
            "items": ((self.capacity.items, ITEM_COLUMNS), torch.int32),
        }
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "rows": ((batch, ROW_COLUMNS), torch.int32),
            "positions": ((self.num_axes, batch), torch.int64),
            "uniforms": ((batch,), torch.float64),
            "temperature": ((batch,), torch.float32),
            "top_p": ((batch,), torch.float32),
            **tiles,
        }
        if self.has_windows:
            shapes |= {_OF_WINDOWS + name: shape for name, shape in tiles.items()}
        for name, (shape, dtype) in shapes.items():
            section = _Section(words, shape, dtype)
            sections[name] = section
            words += -(-section.num_words // _ALIGNED_WORDS) * _ALIGNED_WORDS
        return sections

    @cached_property
    def num_words(self) -> int:
        *_, last = self.sections.values()
        return last.first_word + last.num_words

    def on_host(self, buffer: Tensor) -> HostStep:
        step, windows = _parted({k: s.of(buffer).numpy() for k, s in self.sections.items()})
        return HostStep(**step, windows=TileBuffers(**windows) if windows else None)

    def on_device(self, buffer: Tensor) -> DeviceStep:
        step, windows = _parted({k: s.of(buffer) for k, s in self.sections.items()})
        return DeviceStep(**step, windows=DeviceTiles(**windows) if windows else None)


def _parted(sections: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step's own, and those of its windows by their names without the prefix."""
    own = {k: v for k, v in sections.items() if not k.startswith(_OF_WINDOWS)}
    windows = {k.removeprefix(_OF_WINDOWS): v for k, v in sections.items() if k not in own}
    return own, windows


@dataclass(frozen=True, slots=True)
class _Section:
    first_word: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_words(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize // torch.int32.itemsize

    def of(self, buffer: Tensor) -> Tensor:
        words = buffer[self.first_word : self.first_word + self.num_words]
        return words.view(self.dtype).view(self.shape)


@dataclass(slots=True, eq=False)
class _HostBuffer:
    words: Tensor  # int32, pinned where the device is a GPU
    event: Event
    steps: dict[StepLayout, HostStep] = field(default_factory=dict)


class StepUploads:
    """Sends steps to the device.

    Args:
        num_words: of the largest layout.
        depth: steps that may be in flight while the host fills the next one.
        new_event: makes the events of a device's stream.
    """

    def __init__(
        self,
        num_words: int,
        device: torch.device,
        *,
        depth: int,
        new_event: Callable[[], Event] | None = None,
    ) -> None:
        new_event = new_event or _event_maker(device)
        self._on_device = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._ring = [
            _HostBuffer(_host_words(num_words, device), new_event()) for _ in range(depth + 1)
        ]
        self._device_steps: dict[StepLayout, DeviceStep] = {}
        self._next = 0

    def clear(self) -> None:
        """Zeros on the device: a step of padding in every layout."""
        self._on_device.zero_()

    def device_step(self, layout: StepLayout) -> DeviceStep:
        """Where the device finds a step of this layout; always the same memory."""
        step = self._device_steps.get(layout)
        if step is None:
            step = self._device_steps[layout] = layout.on_device(self._on_device)
        return step

    def begin(self, layout: StepLayout) -> HostStep:
        """Memory to fill for the next `send`; holds whatever an earlier step left there.

        Waits for the device only where more steps than `depth` are in flight.
        """
        buffer = self._ring[self._next]
        buffer.event.synchronize()
        step = buffer.steps.get(layout)
        if step is None:
            step = buffer.steps[layout] = layout.on_host(buffer.words)
        return step

    def send(self, layout: StepLayout) -> DeviceStep:
        """Copies what has been filled since `begin`; the host does not wait."""
        buffer = self._ring[self._next]
        count = layout.num_words
        self._on_device[:count].copy_(buffer.words[:count], non_blocking=True)
        buffer.event.record()
        self._next = (self._next + 1) % len(self._ring)
        return self.device_step(layout)


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """Of a step's rows, int32 [B] each."""

    ids: Int32s  # chosen tokens
    flags: Int32s
    refreshes: Int32s


class Download:
    """Results on their way to the host."""

    def __init__(self, words: Tensor, event: Event) -> None:
        self._words: Tensor | None = words  # [3, B]
        self._event = event
        self._results: Results | None = None

    def read(self) -> Results:
        """Waits for this step's copy alone, not for whatever is queued after it."""
        if self._results is None:
            assert self._words is not None
            self._event.synchronize()
            self._results = Results(*self._words.numpy().copy())
            self._words = None
        return self._results


class ResultDownloads:
    """Fetches results from the device.

    Args:
        max_rows: of the largest bucket.
        depth: steps whose results may be under way while another one's are asked for.
        new_event: makes the events of a device's stream.
    """

    def __init__(
        self,
        max_rows: int,
        device: torch.device,
        *,
        depth: int,
        new_event: Callable[[], Event] | None = None,
    ) -> None:
        new_event = new_event or _event_maker(device)
        self._ring = [(_host_words(3 * max_rows, device), new_event()) for _ in range(depth + 1)]
        self._downloads: list[Download | None] = [None] * (depth + 1)
        self._next = 0

    def start(self, results: Tensor) -> Download:
        """Queues a copy of results; the host does not wait.

        Args:
            results: int32 [3, B], contiguous: ids, flags, refreshes. May be overwritten by work
                that is queued on the same stream after this call.
        """
        assert results.dtype == torch.int32 and results.is_contiguous() and len(results) == 3
        earlier = self._downloads[self._next]
        if earlier is not None:
            earlier.read()  # before its memory is taken
        words, event = self._ring[self._next]
        copy = words[: results.numel()].view(results.shape)
        copy.copy_(results, non_blocking=True)
        event.record()
        download = self._downloads[self._next] = Download(copy, event)
        self._next = (self._next + 1) % len(self._ring)
        return download


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy on the device, for which the host does not wait."""
    return transfer.to_device(torch.from_numpy(np.ascontiguousarray(array)), device)


def _host_words(num_words: int, device: torch.device) -> Tensor:
    is_pinned = device.type == "cuda"
    return torch.zeros(num_words, dtype=torch.int32, pin_memory=is_pinned)


def _event_maker(device: torch.device) -> Callable[[], Event]:
    if device.type == "cuda":
        return torch.cuda.Event
    return _NoEvent
