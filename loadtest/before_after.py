"""The engine of this checkout against that of another one, by turns in one run.

    git worktree add ../before COMMIT
    python -m loadtest.before_after ../before [--turns 7] [--json]

Both engines stay loaded, each in its own process, and take turns at one measurement after another.
Only one works at a time, so both see the same machine, and turns are as short as possible: a shared
machine is faster one second and slower the next. LLaVA-OneVision-0.5B's geometry on the CPU with
random weights, one layer of vision tower, and 8 frames: 1,568 visual tokens, 740 after stage I.
Prints the median ratio of paired turns, ours / the other's, for each measurement: below 1 we are
faster. Uses only the engine's public interface, which both have.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from loadtest import machine

ROOT = Path(__file__).parent.parent
NUM_STEPS = 10  # timed decode steps of a turn
NUM_QUESTIONS = 9  # "second question" is the median of
NUM_FRAMES = 8
SHORT_TURNS = 4  # turns of a one-second measurement for each turn of a longer one


class Side:
    """One checkout's engine in its own process, which works only when asked."""

    def __init__(self, checkout: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--child"],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self, measurement: str) -> float:
        """Runs one turn; returns its seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(measurement + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with {self._process.wait()}")
        return float(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(before: Path, turns: int) -> dict[str, Any]:
    """Medians of each side's seconds, and of the paired ratios."""
    sides = {"before": Side(before), "after": Side(ROOT)}
    rows = []
    for name, (num_turns, _) in MEASUREMENTS.items():
        seen: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(-1, turns * num_turns):  # the first one warms up
            # The order alternates, so that leftovers of one run favour neither.
            for side in list(sides) if turn % 2 else list(reversed(sides)):
                seconds = sides[side].turn(name)
                if turn >= 0:
                    seen[side].append(seconds)
        print(name, file=sys.stderr, flush=True)
        pairs = zip(seen["after"], seen["before"], strict=True)
        ratios = sorted(after / before for after, before in pairs)
        rows.append(
            {
                "name": name,
                "before_s": statistics.median(seen["before"]),
                "after_s": statistics.median(seen["after"]),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
        )
    for each in sides.values():
        each.close()
    return {"turns": turns, "rows": rows}


# --- in the child, with the checkout's own packages ---


def child() -> None:
    import torch

    from loadtest.geometry import random_llava_onevision_0_5b

    torch.manual_seed(0)
    make: Callable[..., Any] = random_llava_onevision_0_5b
    model = make(device="cpu", dtype=torch.bfloat16, num_vision_layers=1)
    name, measure = "", None
    for line in sys.stdin:
        if line.strip() != name:
            name, measure = line.strip(), None  # frees what the last measurement held
            measure = MEASUREMENTS[name][1](model)
        assert measure is not None
        print(measure(), flush=True)


def prefill(policy: str, model: Any) -> Callable[[], float]:
    def measure() -> float:
        engine = make_engine(model)
        engine.add(make_sequence("first", policy))
        return seconds_to_token(engine)

    return measure


def decode(policy: str, batch: int, model: Any) -> Callable[[], float]:
    """One turn of decoding; several sequences are about two videos."""
    engine, names = make_engine(model), [str(number) for number in range(batch)]
    for number, name in enumerate(names):
        engine.add(make_sequence(name, policy, video=number % 2, max_tokens=4000))
    num_answering = 0
    while num_answering < batch:
        num_answering = max(num_answering, len(engine.step()))

    def measure() -> float:
        started_at = time.perf_counter()
        for _ in range(NUM_STEPS):
            engine.step()
        return (time.perf_counter() - started_at) / NUM_STEPS

    return measure


def second_question(model: Any) -> Callable[[], float]:
    """A second question about a video whose prompt the engine has."""
    engine = make_engine(model)
    engine.add(make_sequence("first", "dycoke"))
    seconds_to_token(engine)
    engine.abort("first")

    def measure() -> float:
        samples = []
        for _ in range(NUM_QUESTIONS):
            engine.add(make_sequence("next", "dycoke", question="And at the end of the video?"))
            samples.append(seconds_to_token(engine))
            engine.abort("next")
        return statistics.median(samples)

    return measure


def sixteen_questions(model: Any) -> Callable[[], float]:
    """16 questions about one video, answers of 48 tokens, timed from the first event on."""

    def measure() -> float:
        engine = make_engine(model)
        for number in range(16):
            engine.add(make_sequence(str(number), "dycoke", question=f"What is number {number}?"))
        seconds_to_token(engine)
        started_at = time.perf_counter()
        while engine.has_work:
            engine.step()
        return time.perf_counter() - started_at

    return measure


def make_engine(model: Any) -> Any:
    from dycoke_core.config import EngineConfig
    from dycoke_core.engine import Engine

    return Engine(
        model, EngineConfig(device="cpu", kv_cache_bytes=4 * 2**30, max_running_sequences=16)
    )


def make_sequence(
    name: str,
    policy: str,
    *,
    video: int = 0,
    question: str = "Which shape appears first?",
    max_tokens: int = 48,
) -> Any:
    import numpy as np

    from dycoke_core.config import CompressionConfig
    from dycoke_core.engine import SamplingParams, Sequence
    from dycoke_core.sequence import ChatMessage

    return Sequence(
        sequence_id=name,
        messages=(ChatMessage("user", question),),
        frames=np.random.default_rng(video).integers(0, 256, (NUM_FRAMES, 384, 384, 3), np.uint8),
        sampling=SamplingParams(max_tokens=max_tokens),
        compression=CompressionConfig.parse(policy),
        video_key=f"video {video}",
    )


def seconds_to_token(engine: Any) -> float:
    """Seconds of all steps up to the next event, including a thin vision tower."""
    started_at = time.perf_counter()
    while not engine.step():
        pass
    return time.perf_counter() - started_at


# Turns of each measurement for every turn asked for, and the function that prepares it.
MEASUREMENTS: dict[str, tuple[int, Callable[[Any], Callable[[], float]]]] = {
    "prefill full": (1, partial(prefill, "full")),
    "prefill dycoke": (1, partial(prefill, "dycoke")),
    "second question": (SHORT_TURNS, second_question),
    "decode full, batch 1": (SHORT_TURNS, partial(decode, "full", 1)),
    "decode dycoke, batch 1": (SHORT_TURNS, partial(decode, "dycoke", 1)),
    "decode dycoke, batch 8": (SHORT_TURNS, partial(decode, "dycoke", 8)),
    "16 questions": (1, sixteen_questions),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.before_after", description=__doc__)
    parser.add_argument("before", type=Path, help="a checkout to compare with")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="a JSON object on the last line")
    arguments = parser.parse_args()
    measured_with = machine.describe()
    result = compare(arguments.before.resolve(), arguments.turns)
    print(f"{'seconds, medians':28} {'before':>9} {'after':>9} {'after / before':>15}")
    for row in result["rows"]:
        spread = f"{row['ratios'][0]:.3f} to {row['ratios'][-1]:.3f}"
        print(
            f"{row['name']:28} {row['before_s']:9.4f} {row['after_s']:9.4f} "
            f"{row['ratio']:15.3f}   ({spread})"
        )
    if arguments.json:
        print(json.dumps({"machine": measured_with, **result}))
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        child()
        sys.exit(0)
    sys.exit(main())
