"""A worker whose engine costs next to nothing, run by path in a checkout: `python -P worker.py N`.

Uses only what every checkout since 6e49da4 has. The question controls the engine:

    pace:0.02    seconds between steps for all sequences
    crowd:256 rush:0.005    another pace while there are this many sequences
    work:40000   iterations of an empty loop in each step, whose wall time is recorded

The token ids of an answer are 0, 1, 2, ..., so that a client notices if any is missing. What the
steps took is written as JSON to the file that `PATH_STEPS_FILE` names, twice a second.
"""

import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MAX_MODEL_TOKENS = 10_000_000  # more than the longest answer and its prompt
WRITE_EVERY_S = 0.5


def make_engine(max_running_sequences: int) -> Any:
    fake: Any = importlib.import_module("tests.integration.fake_engine")
    core: Any = importlib.import_module("dycoke_core.sequence")
    token_event, decoding, length = core.TokenEvent, core.Stage.DECODING, core.FinishReason.LENGTH

    class PacedEngine(fake.FakeEngine):  # type: ignore[misc]
        """The tests' engine with another `step`: tokens at a pace, for a microsecond each."""

        def __init__(self) -> None:
            super().__init__(max_running_sequences)
            self._next_step_at = 0.0
            self._steps = _Steps(Path(os.environ["PATH_STEPS_FILE"]))

        @property
        def card(self) -> Any:
            return dataclasses.replace(super().card, max_model_tokens=MAX_MODEL_TOKENS)

        def step(self) -> list[Any]:
            running = list(self.sequences.values())[:max_running_sequences]
            words = fake.words(running[0])
            self._steps.note(len(running), _turn(_number("work:", words)))
            now = time.monotonic()
            pace_s = _pace_s(words, len(running))
            self._next_step_at = max(self._next_step_at + pace_s, now)
            time.sleep(self._next_step_at - now)
            events = []
            for sequence in running:
                sequence.stage = decoding
                output = sequence.output_token_ids
                index = len(output)
                output.append(index)
                is_last = index + 1 == sequence.sampling.max_tokens
                if is_last:
                    del self.sequences[sequence.sequence_id]
                events.append(
                    token_event(
                        sequence_id=sequence.sequence_id,
                        index=index,
                        token_ids=(index,),
                        text=f"t{index} ",
                        finish_reason=length if is_last else None,
                        report=fake.make_report(output) if is_last else None,
                    )
                )
            return events

    return PacedEngine()


class _Steps:
    """Counts steps, and keeps the wall times of their work since the last write, by the number of
    sequences."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._count = 0
        self._work_s: dict[int, list[float]] = {}
        self._write_at = 0.0

    def note(self, num_running: int, work_s: float) -> None:
        self._count += 1
        if work_s:
            self._work_s.setdefault(num_running, []).append(work_s)
        if (now := time.monotonic()) >= self._write_at:
            self._write_at = now + WRITE_EVERY_S
            beside = self._file.with_suffix(".new")
            beside.write_text(json.dumps({"steps": self._count, "work_s": self._work_s}))
            beside.replace(self._file)


def _turn(times: float) -> float:
    """Python work that releases the GIL only when another thread asks for it; returns seconds."""
    if not times:
        return 0.0
    began_at = time.perf_counter()
    for _ in range(int(times)):
        pass
    return time.perf_counter() - began_at


def _pace_s(words: list[str], num_running: int) -> float:
    crowd = _number("crowd:", words)
    return _number("rush:" if crowd and num_running >= crowd else "pace:", words)


def _number(prefix: str, words: list[str]) -> float:
    return next((float(w.removeprefix(prefix)) for w in words if w.startswith(prefix)), 0.0)


def main() -> int:
    process: Any = importlib.import_module("app.worker.process")
    settings: Any = importlib.import_module("app.settings").load_settings()
    exit_code: int = process.run(
        settings,
        int(sys.argv[1]),
        engine_factory=lambda given: make_engine(given.max_running_jobs),
    )
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
