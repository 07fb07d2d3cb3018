"""The engine of this checkout against that of another one, by turns in one run.

    git worktree add ../before COMMIT
    python -m loadtest.before_after ../before [--turns 5] [--json]

Both engines stay loaded, in a process each, and take turns; only one works at a time, so that both
see the same machine. LLaVA-OneVision-0.5B's geometry on the CPU with random weights, one layer of
vision tower, and 8 frames: 1,568 visual tokens, 740 after stage I. Prints the median ratio of
paired turns, ours / the other's, for each measurement: below 1 we are faster. Uses nothing but the
engine's public interface, which both have.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadtest import machine

ROOT = Path(__file__).parent.parent
NUM_STEPS = 10  # timed decode steps, after two
NUM_FRAMES = 8


class Side:
    """One checkout's engine in a process of its own, which works when it is asked to."""

    def __init__(self, checkout: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--child"],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self) -> dict[str, float]:
        """Seconds by measurement."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with {self._process.wait()}")
        figures: dict[str, float] = json.loads(line)
        return figures

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(before: Path, turns: int) -> dict[str, Any]:
    """Medians of each side's seconds, and of the paired ratios."""
    sides = {"before": Side(before), "after": Side(ROOT)}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(-1, turns):  # the first one warms up
        # Who goes first changes, so that what a turn leaves behind favours nobody.
        order = list(sides) if turn % 2 else list(reversed(sides))
        for name in order:
            figures = sides[name].turn()
            if turn >= 0:
                seen[name].append(figures)
        print(f"turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
    for side in sides.values():
        side.close()
    rows = []
    for name in seen["after"][0]:
        pairs = [(b[name], a[name]) for b, a in zip(seen["before"], seen["after"], strict=True)]
        ratios = sorted(after / before for before, after in pairs)
        rows.append(
            {
                "name": name,
                "before_s": statistics.median(before for before, _ in pairs),
                "after_s": statistics.median(after for _, after in pairs),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
        )
    return {"turns": turns, "rows": rows}


# --- in the child, with the checkout's own packages ---


def child() -> None:
    import torch

    from loadtest.geometry import random_llava_onevision_0_5b

    torch.manual_seed(0)
    make: Callable[..., Any] = random_llava_onevision_0_5b
    model = make(device="cpu", dtype=torch.bfloat16, num_vision_layers=1)
    for _ in sys.stdin:
        print(json.dumps(measure(model)), flush=True)


def measure(model: Any) -> dict[str, float]:
    figures = {}
    for policy in ("full", "dycoke"):
        engine = make_engine(model)
        engine.add(make_sequence("first", policy))
        figures[f"prefill {policy}"] = seconds_to_token(engine)
        figures[f"decode {policy}, batch 1"] = step_seconds(engine)
        if policy == "dycoke":
            engine.abort("first")
            engine.add(make_sequence("second", policy, question="And at the end of the video?"))
            figures["second question"] = seconds_to_token(engine)
        for name in ("first", "second"):
            engine.abort(name)
    figures["decode dycoke, batch 8"] = decode_eight(model)
    figures["16 questions"] = sixteen_questions(model)
    return figures


def make_engine(model: Any) -> Any:
    from dycoke_core.config import EngineConfig
    from dycoke_core.engine import Engine

    return Engine(
        model, EngineConfig(device="cpu", kv_cache_bytes=4 * 2**30, max_running_sequences=16)
    )


def make_sequence(
    name: str, policy: str, *, video: int = 0, question: str = "Which shape appears first?"
) -> Any:
    import numpy as np

    from dycoke_core.config import CompressionConfig
    from dycoke_core.engine import SamplingParams, Sequence
    from dycoke_core.sequence import ChatMessage

    return Sequence(
        sequence_id=name,
        messages=(ChatMessage("user", question),),
        frames=np.random.default_rng(video).integers(0, 256, (NUM_FRAMES, 384, 384, 3), np.uint8),
        sampling=SamplingParams(max_tokens=48),
        compression=CompressionConfig.parse(policy),
        video_key=f"video {video}",
    )


def seconds_to_token(engine: Any) -> float:
    """Of all steps up to the next event, with a thin vision tower's part in it."""
    started_at = time.perf_counter()
    while not engine.step():
        pass
    return time.perf_counter() - started_at


def step_seconds(engine: Any) -> float:
    for _ in range(2):
        engine.step()
    started_at = time.perf_counter()
    for _ in range(NUM_STEPS):
        engine.step()
    return (time.perf_counter() - started_at) / NUM_STEPS


def decode_eight(model: Any) -> float:
    """Eight sequences about two videos."""
    engine = make_engine(model)
    for number in range(8):
        engine.add(make_sequence(str(number), "dycoke", video=number % 2))
    num_answering = 0
    while num_answering < 8:
        num_answering = max(num_answering, len(engine.step()))
    seconds = step_seconds(engine)
    for number in range(8):
        engine.abort(str(number))
    return seconds


def sixteen_questions(model: Any) -> float:
    """About one video, answers of 48 tokens, from the first event on."""
    engine = make_engine(model)
    for number in range(16):
        engine.add(make_sequence(str(number), "dycoke", question=f"What is number {number}?"))
    seconds_to_token(engine)
    started_at = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started_at


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.before_after", description=__doc__)
    parser.add_argument("before", type=Path, help="a checkout to compare with")
    parser.add_argument("--turns", type=int, default=5)
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
