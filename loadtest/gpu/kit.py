"""What sections share: the device, the sizes, the report, models already built, and their time."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from loadtest.geometry import Geometry
from loadtest.gpu.report import Report
from loadtest.gpu.sizes import DRY, REAL, Sizes
from loadtest.gpu.workbench import Workbench


@dataclass(slots=True)
class Kit:
    report: Report
    device: torch.device
    sizes: Sizes
    deadline: float = float("inf")  # of the section that runs, on the monotonic clock
    _benches: dict[Geometry, Workbench] = field(default_factory=dict)
    _failures: dict[Geometry, Exception] = field(default_factory=dict)

    @classmethod
    def create(cls, report: Report) -> "Kit":
        device = torch.device("cpu") if report.is_dry else torch.device("cuda", 0)
        return cls(report, device, DRY if report.is_dry else REAL)

    @property
    def is_dry(self) -> bool:
        return self.report.is_dry

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def has_time(self) -> bool:
        return self.seconds_left > 0

    def bench(self, size: Literal["large", "small"]) -> Workbench:
        """The model and engine of this size, built once; a failed build is not tried again.

        Raises:
            Exception: whatever the build raised.
        """
        geometry: Geometry = getattr(self.sizes, size)
        if geometry in self._failures:
            raise self._failures[geometry]
        if geometry not in self._benches:
            try:
                kv_bytes = self.sizes.kv_bytes[size == "small"]
                bench = Workbench.build(geometry, self.sizes, self.device, kv_bytes=kv_bytes)
            except Exception as error:
                self._failures[geometry] = error
                raise
            self._benches[geometry] = bench
            self.report.detail(f"build_{size}_s", bench.build_s)
        return self._benches[geometry]


@dataclass(frozen=True, slots=True)
class Section:
    """
    Args:
        share: of the run's time, relative to the other sections'.
        process: sections of one process share models; a device fault ends only that process.
    """

    name: str
    run: Callable[[Kit], None]
    share: float
    process: str
