"""Runs the profile by turns: every setting against a fresh service, at the same arrivals."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.auto.calibration import Calibration, calibrate, warm_up
from loadtest.auto.figures import AUTO, FULL
from loadtest.auto.profile import PHASES, Arrival, plan_arrivals
from loadtest.auto.run import OpenLoop, RunResult
from loadtest.auto.videos import Video
from loadtest.running import running_service
from loadtest.runs import Spread
from loadtest.stalls import repeat_stalled

Turn = dict[str, RunResult]  # by setting


@dataclass(frozen=True, slots=True)
class Bench:
    """Args:
    folder: for the services' data; each gets one of its own in it.
    service_settings: of every service.
    judges: see `OpenLoop`.
    """

    folder: Path
    service_settings: Mapping[str, str]
    videos: Sequence[Video]
    judges: bool

    def calibrate(self, *, num_questions: int, objective_factor: float) -> Calibration:
        """Raises: RuntimeError: a question got no answer."""
        with self._loop("calibration", FULL) as loop:
            return calibrate(
                loop,
                self.videos,
                num_questions=num_questions,
                objective_factor=objective_factor,
            )

    def run(
        self,
        settings: Sequence[str],
        *,
        num_turns: int,
        phase_s: float,
        capacity_per_s: float,
        objective_s: float,
        seed: int,
    ) -> list[Turn]:
        """Each turn has arrivals of its own and begins with another setting.

        Args:
            settings: policies' names, or compressions as JSON.
            objective_s: for `auto`.

        Raises:
            ValueError: phases so short that no question comes.
        """
        compressions = {setting: as_compression(setting) for setting in settings}
        if AUTO in compressions:
            compressions[AUTO] = {"policy": AUTO, "objective_s": objective_s}
        turns: list[Turn] = []
        for number in range(num_turns):
            arrivals = plan_arrivals(
                PHASES,
                self.videos,
                phase_s=phase_s,
                capacity_per_s=capacity_per_s,
                seed=seed + number,
            )
            if not arrivals:
                raise ValueError(f"no question comes in phases of {phase_s:g} s")
            first = number % len(settings)
            turn: Turn = {}
            for setting in (*settings[first:], *settings[:first]):
                head = f"[turn {number + 1}/{num_turns}] {setting}"
                turn[setting] = self._profile(head, compressions[setting], arrivals)
            turns.append(turn)
        return turns

    def _profile(self, head: str, compression: Any, arrivals: Sequence[Arrival]) -> RunResult:
        def run() -> RunResult:
            with self._loop(head, compression) as loop:
                warm_up(loop, self.videos)
                result = loop.run(arrivals)
            print(f"{head}: {_in_short(result)}", flush=True)
            return result

        return repeat_stalled(run)

    @contextmanager
    def _loop(self, name: str, compression: Any) -> Iterator[OpenLoop]:
        """An open loop against a service that has answered nothing yet."""
        print(f"{name}: starting a service ...", end="\r" if sys.stdout.isatty() else "\n")
        number = sum(1 for _ in self.folder.glob("service-*"))
        folder = self.folder / f"service-{number}"
        folder.mkdir()
        with running_service(folder, self.service_settings) as service:
            yield OpenLoop(service.url, self.videos, compression, judges=self.judges)


def as_compression(setting: str) -> Any:
    """As in a request. Raises: ValueError: neither a name nor JSON."""
    return json.loads(setting) if setting.startswith("{") else setting


def _in_short(result: RunResult) -> str:
    outcomes = result.outcomes
    ttft = Spread.of([o.ttft_s for o in outcomes if o.ttft_s is not None])
    times = f"TTFT p50 {ttft.p50:.3f} p95 {ttft.p95:.3f} s, " if ttft else ""
    return (
        f"{sum(o.is_answered for o in outcomes)} answers to {len(outcomes)} questions, {times}"
        f"{sum(o.refused is not None for o in outcomes)} refused, "
        f"{sum(o.failure is not None for o in outcomes)} failures"
    )
