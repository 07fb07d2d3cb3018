"""What the service itself costs: CPU time per token and per request, by process, without a model.

    python -m loadtest.path [--streams 1 64 512] [--turns 3] [--seconds 4] [--json]
    git worktree add ../before COMMIT
    python -m loadtest.path --before ../before --json

API, worker and a private Redis run as processes; a fake engine makes a token for each sequence at a
set pace; clients stream from another process and check every token. The figures are CPU times of
the processes, so they hold on a shared machine, except for effects of caches and clock rates; the
fake engine's own microseconds count for the worker. With `--before` both services are up and take
turns, and the ratio is the median over paired turns. What the processes use when idle, a few ms per
second, is measured first and deducted.

    token      N streams at a pace, over a window in which all are answering
    request    questions of one token about a video whose frames are stored, N at a time
    limit      what one API delivers in one CPU second; and what arrives where far more tokens are
               made than any part can pass on, when events that wait are passed on together
    engine     wall time of a fixed piece of Python in each step with 1 and N streams, and the CPU
               time per step of the worker's event loop, which is what can hold the engine's GIL
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loadtest.machine import describe
from loadtest.path.stack import PARTS, Clients, Stack, running_stacks

ROOT = Path(__file__).parents[2]
PACE_S = {1: 0.01, 64: 0.1, 512: 0.8}  # between steps: at ease for either side
FLOOD_STREAMS, FLOOD_PACE_S = 256, 0.005
ENGINE_STREAMS, ENGINE_PACE_S, ENGINE_WORK = 64, 0.02, 60_000
NUM_REQUESTS = {1: 50, 64: 192, 512: 512}
NEVER = 1_000_000  # tokens: a stream that is read until it is closed
SETTLE_S = 0.5

Figures = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.path", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window")
    parser.add_argument("--json", action="store_true", help="a JSON object on the last line")
    options = parser.parse_args()
    about = describe()
    checkouts = {"after": ROOT}
    if options.before is not None:
        checkouts = {"before": options.before.resolve()} | checkouts
    clients = Clients()
    with tempfile.TemporaryDirectory(prefix="dycoke-path-") as folder:
        with running_stacks(checkouts, Path(folder)) as stacks:
            seen = _take_turns(stacks, clients, options)
        clients.close()
    rows = _rows(seen)
    _print(rows)
    if options.json:
        print(
            json.dumps(about | {"turns": options.turns, "seconds": options.seconds, "rows": rows})
        )
    return 0


def _take_turns(
    stacks: dict[str, Stack], clients: Clients, options: argparse.Namespace
) -> dict[str, list[Figures]]:
    seen: dict[str, list[Figures]] = {name: [] for name in stacks}
    for stack in stacks.values():
        stack.measure_idle(options.seconds)
    for turn in range(-1, options.turns):  # the first one warms up
        # The order alternates, so that leftovers of one run favour neither.
        for name in list(stacks) if turn % 2 else list(reversed(stacks)):
            is_warm_up = turn < 0
            seconds = 1.0 if is_warm_up else options.seconds
            figures = _turn(stacks[name], clients, options.streams, seconds, is_warm_up)
            if not is_warm_up:
                seen[name].append(figures)
        print(f"turn {turn + 1} of {options.turns}", file=sys.stderr, flush=True)
    return seen


def _turn(
    stack: Stack, clients: Clients, levels: list[int], seconds: float, is_warm_up: bool
) -> Figures:
    figures: Figures = {}
    for streams in levels[:2] if is_warm_up else levels:
        pace_s = PACE_S.get(streams, 0.02)
        window = _window(stack, clients, streams, f"pace:{pace_s}", seconds)
        for part in PARTS:
            figures[f"token, {streams} streams: {part}, us"] = 1e6 * window[part] / window["tokens"]
        _add_sum(figures, f"token, {streams} streams")
        name = f"limit: events per CPU second of the api, {streams} streams"
        figures[name] = window["events"] / window["api"]
    for streams in [] if is_warm_up else levels:
        spent = _requests(stack, clients, streams, NUM_REQUESTS.get(streams, 2 * streams))
        figures |= {f"request, {streams} at a time: {p}, us": 1e6 * spent[p] for p in PARTS}
        _add_sum(figures, f"request, {streams} at a time")
        figures[f"request, {streams} at a time: refused at first"] = spent["refused"]
    if not is_warm_up:
        figures |= _flood(stack, clients, seconds) | _engine(stack, clients, seconds)
    return figures


def _add_sum(figures: Figures, name: str) -> None:
    figures[f"{name}: all, us"] = sum(figures[f"{name}: {part}, us"] for part in PARTS)


def _window(
    stack: Stack, clients: Clients, streams: int, question: str, seconds: float
) -> dict[str, float]:
    """Streams for a while: CPU seconds by part, steps, seconds, and tokens and events received."""
    fields = {"question": question, "max_tokens": NEVER}
    clients.say(url=stack.url, streams=streams, requests=0, fields=_about(stack, fields))
    clients.hear()
    time.sleep(SETTLE_S)
    before, steps, from_s = stack.cpu_s(), stack.steps()["steps"], time.monotonic()
    time.sleep(seconds)
    spent, to_s = stack.spent_since(before), time.monotonic()
    steps = stack.steps()["steps"] - steps
    clients.say(from_s=from_s, to_s=to_s)
    came = clients.hear()
    stack.wait_until_idle()
    return {**came, **spent, "steps": steps, "seconds": to_s - from_s}


def _requests(stack: Stack, clients: Clients, streams: int, number: int) -> dict[str, float]:
    """CPU seconds per request, by part."""
    fields = {"question": "pace:0.001", "max_tokens": 1}
    before = stack.cpu_s()
    clients.say(url=stack.url, streams=streams, requests=number, fields=_about(stack, fields))
    num_refused = clients.hear()["refused"]
    spent = stack.spent_since(before)
    stack.wait_until_idle()
    return {part: cpu_s / number for part, cpu_s in spent.items()} | {"refused": num_refused}


def _flood(stack: Stack, clients: Clients, seconds: float) -> Figures:
    question = f"pace:0.2 crowd:{FLOOD_STREAMS} rush:{FLOOD_PACE_S}"
    window = _window(stack, clients, FLOOD_STREAMS, question, seconds)
    return {
        "limit: tokens/s in a flood": window["tokens"] / window["seconds"],
        "limit: events/s in a flood": window["events"] / window["seconds"],
        "limit: cores used by the api in a flood": window["api"] / window["seconds"],
    }


def _engine(stack: Stack, clients: Clients, seconds: float) -> Figures:
    figures: Figures = {}
    for streams in (1, ENGINE_STREAMS):
        question = f"pace:{ENGINE_PACE_S} work:{ENGINE_WORK}"
        noted = len(stack.steps()["work_s"].get(str(streams), []))
        window = _window(stack, clients, streams, question, seconds)
        work_s = stack.steps()["work_s"][str(streams)][noted:]
        beside = f"beside {streams} stream" + "s" * (streams > 1)
        figures[f"engine: work of a step {beside}, median ms"] = 1e3 * statistics.median(work_s)
        figures[f"engine: work of a step {beside}, mean ms"] = 1e3 * statistics.fmean(work_s)
        figures[f"engine: event loop's CPU per step {beside}, ms"] = (
            1e3 * window["loop"] / window["steps"]
        )
    return figures


def _about(stack: Stack, fields: dict[str, Any]) -> dict[str, Any]:
    return {"video_id": stack.video_id, "num_frames": 4, "compression": "full", **fields}


def _rows(seen: dict[str, list[Figures]]) -> list[dict[str, Any]]:
    """Medians of each side, and of the paired ratios."""
    rows = []
    for name in seen["after"][0]:
        row: dict[str, Any] = {"name": name}
        for side, turns in seen.items():
            row[side] = statistics.median(turn[name] for turn in turns)
        if "before" in seen:
            pairs = zip(seen["before"], seen["after"], strict=True)
            row["ratios"] = sorted(a[name] / b[name] for b, a in pairs if b[name])
            row["ratio"] = statistics.median(row["ratios"]) if row["ratios"] else None
        rows.append(row)
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    sides = [side for side in ("before", "after") if side in rows[0]]
    print(f"{'':52}" + "".join(f"{side:>11}" for side in sides) + "   after / before")
    for row in rows:
        line = f"{row['name']:52}" + "".join(f"{row[side]:11.2f}" for side in sides)
        if row.get("ratio") is not None:
            line += f"{row['ratio']:11.3f}  ({row['ratios'][0]:.3f} to {row['ratios'][-1]:.3f})"
        print(line)


if __name__ == "__main__":
    sys.exit(main())
