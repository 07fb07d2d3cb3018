"""How fast a large upload is stored, compared with what the machine can do with the same bytes.

    python -m loadtest.uploads [--megabytes 300] [--turns 5] [--before CHECKOUT] [--json]

The load of a shared machine shows in the rates, so the API's CPU seconds per gigabyte are too.

By turns: `cp` to the same disk followed by a flush, as the store does; `sha256sum`; and a POST to
/v1/videos of a real API, from the first byte sent to the answer, which hashes, stores, flushes and
probes it; with `--before`, of another checkout's API as well. Each upload is a new video: the
bundled clip, which a reader probes, with random bytes after it in a box that readers skip. The
client shares the machine's cores. Prints a table for people, and with --json one JSON object last.
"""

import argparse
import http.client
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loadtest.machine import describe
from loadtest.path.stack import CLIP, Stack, running_stacks

ROOT = Path(__file__).parents[1]
BOUNDARY = "loadtest-uploads"
BLOCK_BYTES = 2**20
TIMEOUT_S = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.uploads", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--json", action="store_true", help="a JSON object on the last line")
    options = parser.parse_args()
    about = describe()
    checkouts = {"upload": ROOT}
    if options.before is not None:
        checkouts = {"upload, before": options.before.resolve()} | checkouts
    with tempfile.TemporaryDirectory(prefix="dycoke-uploads-") as name:
        folder = Path(name)
        with running_stacks(checkouts, folder) as stacks:
            rates, cpu_s = _take_turns(folder, stacks, options.megabytes, options.turns)
    rows = [row_of(name, each, rates, cpu_s.get(name)) for name, each in rates.items()]
    print(f"{'':16}{'MB/s':>8}{'of cp':>8}{'of sha256sum':>14}{'CPU s/GB':>10}", end="")
    print(f"   medians of {options.turns} turns")
    for row in rows:
        cpu = "" if row["cpu_s_per_gb"] is None else f"{row['cpu_s_per_gb']:10.2f}"
        print(f"{row['name']:16}{row['mb_s']:8.0f}{row['of_cp']:8.2f}", end="")
        print(f"{row['of_sha256sum']:14.2f}{cpu}")
    if options.json:
        print(json.dumps(about | {"megabytes": options.megabytes, "rows": rows}))
    return 0


def _take_turns(
    folder: Path, stacks: dict[str, Stack], megabytes: int, num_turns: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """MB/s of each, by turn, and the CPU seconds per gigabyte of the APIs."""
    video = folder / "video.mp4"
    rates: dict[str, list[float]] = {}
    cpu_s: dict[str, list[float]] = {name: [] for name in stacks}
    for turn in range(-1, num_turns):  # the first one warms up
        write_video(video, megabytes)
        works: dict[str, Callable[[], None]] = {
            "cp": lambda: _copy(video, folder / "copy"),
            "sha256sum": lambda: _run("sha256sum", str(video)),
        } | {name: _uploading(stack.url, video) for name, stack in stacks.items()}
        names = list(works) if turn % 2 else list(reversed(works))
        for name in names:
            began_at, used_s = time.perf_counter(), _api_cpu_s(stacks.get(name))
            works[name]()
            seconds = time.perf_counter() - began_at
            used_s = _api_cpu_s(stacks.get(name)) - used_s
            if turn < 0:
                continue
            rates.setdefault(name, []).append(megabytes / seconds)
            if name in cpu_s:
                cpu_s[name].append(1000 * used_s / megabytes)
        (folder / "copy").unlink()
        print(f"turn {turn + 1} of {num_turns}", file=sys.stderr, flush=True)
    return {name: rates[name] for name in ("cp", "sha256sum", *stacks)}, cpu_s


def _api_cpu_s(stack: Stack | None) -> float:
    return stack.cpu_s()["api"] if stack is not None else 0.0


def write_video(path: Path, megabytes: int) -> None:
    """Another one each time."""
    num_bytes = megabytes * 10**6
    with path.open("wb") as file:
        file.write(CLIP.read_bytes())
        file.write(struct.pack(">I4s", num_bytes, b"free"))
        noise = os.urandom(BLOCK_BYTES)
        for start in range(0, num_bytes - 8, BLOCK_BYTES):
            file.write(noise[: num_bytes - 8 - start])
        file.flush()
        os.fsync(file.fileno())


def _copy(source: Path, target: Path) -> None:
    _run("cp", "--reflink=never", str(source), str(target))
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _uploading(url: str, video: Path) -> Callable[[], None]:
    def upload() -> None:
        video_id = _post(url, video)
        _request(url, "DELETE", f"/v1/videos/{video_id}")

    return upload


def _post(url: str, video: Path) -> str:
    head = (
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; "
        f'name="video"; filename="v"\r\n\r\n'.encode()
    )
    tail = f"\r\n--{BOUNDARY}--\r\n".encode()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    connection.putrequest("POST", "/v1/videos")
    connection.putheader("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")
    connection.putheader("Content-Length", str(len(head) + video.stat().st_size + len(tail)))
    connection.endheaders(head)
    assert connection.sock is not None
    with video.open("rb") as file:
        connection.sock.sendfile(file)
    connection.send(tail)
    response = connection.getresponse()
    reply = json.loads(response.read())
    connection.close()
    if response.status >= 300:
        raise RuntimeError(f"the upload was refused: {reply}")
    return str(reply["video_id"])


def _request(url: str, method: str, path: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    connection.request(method, path)
    connection.getresponse().read()
    connection.close()


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def row_of(
    name: str, each: list[float], rates: dict[str, list[float]], cpu_s: list[float] | None
) -> dict[str, Any]:
    def ratio(of: str) -> float:
        return statistics.median(a / b for a, b in zip(each, rates[of], strict=True))

    return {
        "name": name,
        "mb_s": statistics.median(each),
        "of_cp": ratio("cp"),
        "of_sha256sum": ratio("sha256sum"),
        "turns_mb_s": each,
        "cpu_s_per_gb": statistics.median(cpu_s) if cpu_s else None,
    }


if __name__ == "__main__":
    sys.exit(main())
