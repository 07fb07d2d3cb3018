"""`make demo`: asks the service about a bundled clip, with full tokens and with DyCoke.

Starts the service on a free port, streams the answers, says which are right and prints the
receipts. It is a client like any other: it knows the HTTP interface, and what the clip shows.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from app.settings import ENV_PREFIX
from dycoke_core.tiny import CLIP
from dycoke_core.tiny.clip import clip_scene
from dycoke_core.tiny.descriptions import share_of_facts
from dycoke_core.tiny.questions import DESCRIBE, Question, questions_about

FAMILIES = ("direction", "brief_event", "transition", DESCRIBE)
POLICIES = ("full", "dycoke")
MAX_TOKENS = 64
START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0

Receipt = dict[str, Any]


def main() -> int:
    data_dir = Path(tempfile.mkdtemp(prefix="dycoke-demo-"))
    try:
        with _running_service(data_dir) as client:
            _demonstrate(client)
    except (DemoError, httpx.HTTPError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        print(_last_lines(data_dir / "service.log"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)
    print("\nNext: `make serve`, then open http://127.0.0.1:8000 in a browser, or see README.md.")
    return 0


class DemoError(Exception):
    pass


# --- the service ---


@contextlib.contextmanager
def _running_service(data_dir: Path) -> Iterator[httpx.Client]:
    port = _free_port()
    environment = {n: v for n, v in os.environ.items() if not n.startswith(ENV_PREFIX)}
    environment |= {
        "DYCOKE_PORT": str(port),
        "DYCOKE_DATA_DIR": str(data_dir),
        "DYCOKE_WORKER_METRICS_PORT": "0",
    }
    with (data_dir / "service.log").open("wb") as log:
        service = subprocess.Popen(
            [sys.executable, "-m", "app", "serve"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            _wait_until_ready(client, service)
            yield client
    finally:
        _stop(service)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(client: httpx.Client, service: "subprocess.Popen[bytes]") -> None:
    print("Starting Redis, the API and a worker with the bundled model ", end="", flush=True)
    started_at = time.monotonic()
    while time.monotonic() - started_at < START_TIMEOUT_S:
        if service.poll() is not None:
            raise DemoError(f"the service ended at start, exit status {service.returncode}")
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                print(f" ready after {time.monotonic() - started_at:.1f} s")
                return
        print(".", end="", flush=True)
        time.sleep(0.5)
    raise DemoError("the service did not get ready")


def _stop(service: "subprocess.Popen[bytes]") -> None:
    service.send_signal(signal.SIGTERM)
    try:
        service.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        service.kill()
        service.wait()


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log.is_file() else ""


# --- the questions ---


def _demonstrate(client: httpx.Client) -> None:
    model = client.get("/v1/models").json()["data"][0]["id"]
    print(f"Model: {model}, four million weights, trained on moving shapes and nothing else.\n")
    with CLIP.open("rb") as video:
        response = client.post("/v1/videos", files={"video": (CLIP.name, video, "video/mp4")})
    if response.status_code >= 400:
        raise DemoError(response.text)
    video_id = response.json()["video_id"]
    probe = response.json()["probe"]
    print(
        f"Uploaded {CLIP.name}: {probe['num_frames']} frames, {probe['duration_s']:g} s, "
        f"{probe['width']}x{probe['height']} {probe['codec']}; its id is {video_id[:12]}..."
    )
    print("One short answer first, so that neither policy is charged for reading the frames:")
    warm_up = {"policy": "dycoke", "k": 0.5}  # shares no prefix with the questions below
    _ask(client, video_id, "Ready?", warm_up, max_tokens=4)
    questions = [q for q in questions_about(clip_scene()) if q.family in FAMILIES]
    verdicts: list[bool] = []
    for question in questions:
        print(f"\nQuestion: {question.text}")
        receipts = []
        for policy in POLICIES:
            receipt = _ask(client, video_id, question.text, policy, max_tokens=MAX_TOKENS)
            verdicts.append(_judge(question, receipt["text"]))
            receipts.append(receipt)
    print("\nThe receipts of the last question:\n\n" + side_by_side(receipts))
    print("\n`prefix: hit`: later questions about a video skip the prefill of its tokens.")
    print(f"{sum(verdicts)} of {len(verdicts)} answers are wholly right.")


def _judge(question: Question, answer: str) -> bool:
    """Says whether an answer is right, and if not, what would be."""
    if question.family == DESCRIBE:
        share = share_of_facts(answer, question.answer)
        is_right, fault = share == 1.0, f"{share:.0%} right (F1 of its facts)"
    else:
        is_right, fault = question.is_answered_by(answer), "WRONG"
    verdict = "right" if is_right else f"{fault}; right is: {question.answer}"
    print(f"{'':11}{verdict}")
    return is_right


def _ask(
    client: httpx.Client,
    video_id: str,
    question: str,
    compression: str | dict[str, Any],
    *,
    max_tokens: int,
) -> Receipt:
    """Streams one answer to the terminal and returns its receipt."""
    body = {
        "video_id": video_id,
        "question": question,
        "compression": compression,
        "max_tokens": max_tokens,
    }
    progress = _Progress(compression if isinstance(compression, str) else "warm-up")
    started_at = time.monotonic()
    with client.stream("POST", "/v1/video/chat", json=body) as response:
        if response.status_code >= 400:
            response.read()
            raise DemoError(response.text)
        for name, data in _events(response.iter_lines()):
            if time.monotonic() - started_at > ANSWER_TIMEOUT_S:
                raise DemoError("the answer takes too long")
            if name == "status":
                progress.show_status(data)
            elif name == "token":
                progress.show_token(data["text"])
            elif name == "error":
                raise DemoError(f"{data['code']}: {data['message']}")
            elif name == "done":
                progress.end()
                return data
    raise DemoError("the stream ended without an answer")


def _events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Server-sent events as (name, data); heartbeats, which have neither, as ("", {})."""
    name = ""
    for line in lines:
        field, _, value = line.partition(":")
        if not field and line:
            yield "", {}
        elif field == "event":
            name = value.strip()
        elif field == "data":
            yield name, json.loads(value)


class _Progress:
    """Shows the stage on the answer's line until its first token comes."""

    def __init__(self, policy: str) -> None:
        self._head = f"  {policy:>7}: "
        self._has_tokens = False
        self._is_terminal = sys.stdout.isatty()

    def show_status(self, status: dict[str, Any]) -> None:
        if self._is_terminal and not self._has_tokens:
            stage = status["stage"].replace("_", " ")
            print(f"\r\033[K{self._head}[{stage} {status['progress']:.0%}]", end="", flush=True)

    def show_token(self, text: str) -> None:
        if not self._has_tokens:
            print(("\r\033[K" if self._is_terminal else "") + self._head, end="")
            self._has_tokens = True
        print(text, end="", flush=True)

    def end(self) -> None:
        print(flush=True)


# --- the receipts ---

_ROWS: tuple[tuple[str, Callable[[Receipt], str]], ...] = (
    ("visual tokens read", lambda r: f"{r['compression']['visual_tokens_in']}"),
    (
        "  in the prefill (stage I)",
        lambda r: _kept(r["compression"], "visual_tokens_prefill", "prefill"),
    ),
    (
        "  in pruned layers (stage II)",
        lambda r: _kept(r["compression"], "visual_tokens_decode", "decode"),
    ),
    ("refreshes of the kept set", lambda r: f"{r['compression']['refreshes']}"),
    ("GFLOP", lambda r: f"{r['compression']['flops']['exact']['actual'] / 1e9:.2f}"),
    ("KV cache in use, MB", lambda r: f"{r['memory']['kv_bytes'] / 1e6:.2f}"),
    ("DP cache, MB", lambda r: f"{r['memory']['dp_cache_bytes'] / 1e6:.2f}"),
    ("vision tower, ms", lambda r: _ms(r["timings_s"]["vision"])),
    ("prefill, ms", lambda r: _ms(r["timings_s"]["prefill"])),
    ("first token, ms", lambda r: _ms(r["timings_s"]["ttft"])),
    ("per output token, ms", lambda r: _ms(r["timings_s"]["per_output_token"])),
    ("total, ms", lambda r: _ms(r["timings_s"]["total"])),
    ("answer tokens", lambda r: f"{r['usage']['completion_tokens']}"),
    ("prefix of the video", lambda r: r["cache"]["prefix"]),
)


def side_by_side(receipts: list[Receipt]) -> str:
    """A table of receipts, one column each."""
    names = [receipt["compression"]["policy"] for receipt in receipts]
    lines = [f"  {'receipt':32}" + "".join(f"{name:>18}" for name in names)]
    for label, value in _ROWS:
        lines.append(f"  {label:32}" + "".join(f"{value(receipt):>18}" for receipt in receipts))
    return "\n".join(lines)


def _kept(compression: dict[str, Any], count: str, ratio: str) -> str:
    return f"{compression[count]} ({compression['retained_ratio'][ratio]:.1%})"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


if __name__ == "__main__":
    sys.exit(main())
