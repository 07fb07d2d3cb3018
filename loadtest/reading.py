"""Frame reading compared with plain decord: clips of 10 s, 60 s and 10 min, on one core and all.

    python -m loadtest.reading [--turns 5] [--clips 10 60 600] [--only whole ...] [--json]

Makes clips of 1280x720 pixels at 25 frames per second (H.264, three B-frames, a keyframe at least
every ten seconds), then reads 32 frames of 384x384 pixels of each, by turns, in a new process each
time, on as many cores as the column says:

- `decord`: `decord.VideoReader(..., width=384, height=384, num_threads=n).get_batch(indices)`, with
  its own choice of threads if it has all cores. No sandbox, no check of the file.
- `reader`: what the service does: sniff, plan, read in sandboxed children, decord first.
- `pyav`: the same for a video that decord cannot read.
- `keyframe`: the same as `reader` with `sampling: keyframe`.
- `whole`: the same as `reader` for models whose frames are decoded whole, then resized by Pillow.

Prints medians of wall and CPU seconds, children included, and the medians of their ratios to
`decord` in the same turn, and how often PyAV had to read what decord gave up. Costs before reading
(process start, imports, start of the fork servers) are left out everywhere.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from loadtest import machine

WIDTH, HEIGHT, FPS = 1280, 720, 25
NUM_FRAMES, IMAGE_SIZE = 32, 384
UNIT_S = 10  # seconds of video that are encoded; longer clips repeat them
CONTENDERS = ("decord", "reader", "pyav", "keyframe", "whole")


@dataclass(frozen=True, slots=True)
class Cost:
    wall_s: float
    cpu_s: float
    fell_back: bool = False  # decord gave up, as it may on a busy machine, and PyAV read the video


# --- the clips ---


def make_clips(folder: Path, durations_s: list[int]) -> dict[int, Path]:
    """Returns a clip for each duration, a multiple of `UNIT_S`."""
    packets = list(_encode_unit(folder / "unit.mp4"))
    return {s: _repeat(folder, packets, s // UNIT_S) for s in durations_s}


def _encode_unit(path: Path) -> Iterator[Any]:
    """A slow pan over soft texture with grain, and an object that moves: half of the frames come
    out as B-frames that no other frame is predicted from, as of ordinary footage.
    """
    import av

    random = np.random.default_rng(1)
    world = _world(random)
    with av.open(str(path), "w") as output:
        options = {"preset": "medium", "crf": "23", "bf": "3"}
        stream = output.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        size = HEIGHT // 4  # of the object
        for number in range(UNIT_S * FPS):
            x, y = number % WIDTH, int(HEIGHT / 16 * (1 + np.sin(number / 60)))
            image = world[y : y + HEIGHT, x : x + WIDTH].astype(np.int16)
            at = 3 * number % (WIDTH - size)
            image[size : 2 * size, at : at + size] = world[-size:, number : number + size]
            grainy = (image + random.integers(-2, 3, image.shape)).clip(0, 255)
            pixels: npt.NDArray[np.uint8] = grainy.astype(np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        output.mux(stream.encode())
    with av.open(str(path)) as video:
        yield from [packet for packet in video.demux(video.streams.video[0]) if packet.size]


def _world(random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """More than the camera sees: soft blocks of colour with some noise, RGB."""
    shape = (HEIGHT // 8 + 1, WIDTH // 8 + 1, 3)
    rough = random.integers(0, 256, shape).repeat(16, axis=0).repeat(16, axis=1)
    soft = sum(np.roll(rough, (shift, shift), axis=(0, 1)) for shift in range(9)) / 9.0
    world: npt.NDArray[np.uint8] = (
        (soft + random.normal(0, 4, rough.shape)).clip(0, 255).astype(np.uint8)
    )
    return world


def _repeat(folder: Path, unit: list[Any], times: int) -> Path:
    """Writes the unit's packets repeatedly; the unit starts with a keyframe and is complete."""
    import av

    path = folder / f"{times * UNIT_S}s.mp4"
    with av.open(str(folder / "unit.mp4")) as source, av.open(str(path), "w") as output:
        template = source.streams.video[0]
        stream = output.add_stream_from_template(template)
        tick = template.time_base
        assert tick is not None
        for turn in range(times):
            shift = round(turn * UNIT_S / tick)
            for original in unit:
                packet = av.Packet(bytes(original))
                packet.pts, packet.dts = original.pts + shift, original.dts + shift
                packet.time_base, packet.duration = tick, original.duration
                packet.is_keyframe = original.is_keyframe
                packet.stream = stream
                output.mux(packet)
    return path


# --- one reading, in its own process ---


def read_once(contender: str, clip: Path, num_cores: int) -> Cost:
    """Reads the clip once, on `num_cores` cores of those that this process may use."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:num_cores])
    if contender == "decord":
        return _read_with_plain_decord(clip, 1 if num_cores < len(cores) else 0)
    return asyncio.run(_read_as_the_service_does(contender, clip))


def _read_with_plain_decord(clip: Path, num_threads: int) -> Cost:
    import decord

    def read() -> None:
        video = decord.VideoReader(
            str(clip), width=IMAGE_SIZE, height=IMAGE_SIZE, num_threads=num_threads
        )
        indices = np.linspace(0, len(video) - 1, NUM_FRAMES, dtype=int)
        assert video.get_batch(indices).shape[0] == NUM_FRAMES

    started_at, cpu_before_s = time.monotonic(), time.process_time()
    read()
    return Cost(time.monotonic() - started_at, time.process_time() - cpu_before_s)


async def _read_as_the_service_does(contender: str, clip: Path) -> Cost:
    from dycoke_core.model_frames import DEFAULT_RESIZING
    from dycoke_core.video import FrameReaders, FrameSpec, ReadLimits, frame_readers

    if contender == "pyav":
        frame_readers.FOR_DECORD = frozenset()  # as for a container that it cannot read
    spec = FrameSpec(
        NUM_FRAMES,
        IMAGE_SIZE,
        sampling="keyframe" if contender == "keyframe" else "uniform",
        resizing="bicubic" if contender == "whole" else DEFAULT_RESIZING,
    )
    readers = FrameReaders(ReadLimits(timeout_s=300.0, cpu_s=300), max_readers=1)
    try:
        started_at, cpu_before_s = time.monotonic(), _cpu_of_the_family_s()
        frames = await readers.read(clip, spec)
        wall_s, cpu_s = time.monotonic() - started_at, _cpu_of_the_family_s() - cpu_before_s
    finally:
        await readers.aclose()
    return Cost(wall_s, cpu_s, contender == "reader" and frames.reader != "decord")


def _cpu_of_the_family_s() -> float:
    """CPU seconds of this process and of its children, living and ended."""
    total_s = time.process_time()
    for child in psutil.Process().children():
        used = child.cpu_times()
        total_s += used.user + used.system + used.children_user + used.children_system
    return total_s


# --- by turns ---


def measure(
    clips: dict[int, Path], turns: int, contenders: Sequence[str] = CONTENDERS
) -> list[dict[str, Any]]:
    """Args: contenders: `decord` among them."""
    rows = []
    for duration_s, clip in clips.items():
        for num_cores in sorted({1, len(os.sched_getaffinity(0))}):
            seen: dict[str, list[Cost]] = {name: [] for name in contenders}
            for turn in range(turns):
                order = contenders if turn % 2 else contenders[::-1]
                for name in order:
                    seen[name].append(in_a_process(name, clip, num_cores))
                print(
                    f"{duration_s} s, {num_cores} cores: turn {turn + 1} of {turns}",
                    file=sys.stderr,
                    flush=True,
                )
            rows += [row_of(duration_s, num_cores, name, seen) for name in contenders]
    return rows


def in_a_process(contender: str, clip: Path, num_cores: int) -> Cost:
    command = [sys.executable, "-m", "loadtest.reading", "--child", contender, str(num_cores)]
    done = subprocess.run([*command, str(clip)], stdout=subprocess.PIPE, text=True, check=True)
    return Cost(**json.loads(done.stdout))


def row_of(
    duration_s: int, num_cores: int, name: str, seen: dict[str, list[Cost]]
) -> dict[str, Any]:
    def ratio(of: Callable[[Cost], float]) -> float:
        pairs = zip(seen[name], seen["decord"], strict=True)
        return round(statistics.median(of(ours) / of(plain) for ours, plain in pairs), 3)

    return {
        "clip_s": duration_s,
        "cores": num_cores,
        "contender": name,
        "wall_s": round(statistics.median(cost.wall_s for cost in seen[name]), 3),
        "cpu_s": round(statistics.median(cost.cpu_s for cost in seen[name]), 3),
        "wall_ratio": ratio(lambda cost: cost.wall_s),
        "cpu_ratio": ratio(lambda cost: cost.cpu_s),
        "fell_back": sum(cost.fell_back for cost in seen[name]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'clip':>6} {'cores':>5}  {'':9}{'wall s':>8}{'CPU s':>8}"
        f"{'wall / decord':>15}{'CPU / decord':>15}{'fell back':>11}"
    ]
    for row in rows:
        lines.append(
            f"{row['clip_s']:>4} s {row['cores']:>5}  {row['contender']:9}{row['wall_s']:>8.2f}"
            f"{row['cpu_s']:>8.2f}{row['wall_ratio']:>15.2f}{row['cpu_ratio']:>15.2f}"
            f"{row['fell_back']:>11}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.reading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--clips", type=int, nargs="+", default=[10, 60, 600], metavar="SECONDS")
    parser.add_argument(
        "--only", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="beside decord"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON last")
    parser.add_argument("--child", nargs=3, metavar=("CONTENDER", "CORES", "CLIP"))
    arguments = parser.parse_args()
    if arguments.child:
        contender, num_cores, clip = arguments.child
        cost = read_once(contender, Path(clip), int(num_cores))
        print(json.dumps(asdict(cost)))
        return
    if any(seconds < 1 or seconds % UNIT_S for seconds in arguments.clips):
        parser.error(f"--clips must be multiples of {UNIT_S}")
    before = machine.describe()
    with tempfile.TemporaryDirectory(prefix="dycoke-reading-") as folder:
        contenders = [name for name in CONTENDERS if name in {"decord", *arguments.only}]
        rows = measure(make_clips(Path(folder), arguments.clips), arguments.turns, contenders)
    print(table(rows))
    if arguments.json:
        after = os.getloadavg()[0]
        print(json.dumps({**before, "load_after": after, "turns": arguments.turns, "rows": rows}))


if __name__ == "__main__":
    main()
