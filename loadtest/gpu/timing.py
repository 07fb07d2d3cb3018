"""How things are timed: on the host between two synchronisations, or by device events."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from dycoke_core.engine import Engine


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """mean_s: wall clock over all steps, synchronised only at both ends. median_s: of the times
    between returns of `step`, which the device paces without another wait."""

    mean_s: float
    median_s: float
    num_steps: int
    num_tokens: int

    @property
    def tokens_s(self) -> float:
        return self.num_tokens / (self.mean_s * self.num_steps)


def time_steps(engine: Engine, num_steps: int) -> StepTimes:
    device = engine.model.device
    num_tokens = 0
    synchronize(device)
    moments = [time.perf_counter()]
    for _ in range(num_steps):
        num_tokens += sum(len(event.token_ids) for event in engine.step())
        moments.append(time.perf_counter())
    synchronize(device)
    seconds = time.perf_counter() - moments[0]
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    return StepTimes(seconds / num_steps, statistics.median(gaps), num_steps, num_tokens)


def by_turns(
    cases: Mapping[str, Callable[[], float]], *, turns: int, has_time: Callable[[], bool]
) -> dict[str, list[float]]:
    """Measures every case once, then every case again, so that drifts affect all cases alike.

    Args:
        has_time: asked before every turn but the first.
    """
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(turns):
        if turn and not has_time():
            break
        for name, measure in cases.items():
            samples[name].append(measure())
    return samples


def ratios(above: Iterable[float], below: Iterable[float]) -> list[float]:
    """Ratios turn by turn."""
    return [a / b for a, b in zip(above, below, strict=True)]


def device_seconds(run: Callable[[], object], device: torch.device, *, repeats: int = 20) -> float:
    """Median seconds of `run` on the device, after warm-up, with the caches emptied between runs.

    On a CPU by the wall clock, for dry runs.
    """
    if device.type != "cuda":
        return _wall_seconds(run, repeats=2)
    run()
    torch.cuda.synchronize(device)
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device=device)  # more than any L2
    timers = [DeviceTimer() for _ in range(repeats)]
    for timer in timers:
        cache.zero_()  # takes longer than a launch: the host is ahead of the device
        with timer:
            run()
    torch.cuda.synchronize(device)
    return statistics.median(timer.seconds() for timer in timers)


class DeviceTimer:
    """Times what is launched inside, by events on the current stream. CUDA only."""

    def __init__(self) -> None:
        self._begin, self._end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )

    def __enter__(self) -> "DeviceTimer":
        self._begin.record()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.record()

    def seconds(self) -> float:
        """The seconds, after waiting for the device."""
        return float(self._begin.elapsed_time(self._end)) / 1e3


def _wall_seconds(run: Callable[[], object], *, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started_at = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds)
