"""How long an answer about a new video takes, and where the time goes.

    python -m loadtest.new_video [--number 5] [--model DIR] [--json]

Starts the service, and has H.264 files of 32 frames described with full tokens and with DyCoke by
turns, the same scenes in separate files: upload, frame reading, vision tower, prefill, some thirty
tokens. Prints medians of what the client saw and of the receipts' stages, and with --json one JSON
object last.

Not covered: several clients at once (`loadtest.compare`).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from dycoke_core.tiny.clip import write_video
from dycoke_core.tiny.questions import DESCRIBE, PHRASINGS
from dycoke_core.tiny.render import render
from dycoke_core.tiny.scenes import sample_scene
from loadtest.client import Answer, Service, with_content_of_its_own
from loadtest.machine import describe
from loadtest.running import running_service

POLICIES = ("full", "dycoke")
STAGES = ("read_frames", "vision", "compress", "prefill", "decode", "per_output_token")
FIRST_SEED = 10_000  # of the test split, away from those of the accuracy figures

Figures = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.new_video",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--number", type=int, default=5, help="of videos for each policy")
    parser.add_argument("--model", help="a checkpoint's directory; without it the bundled one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    about = describe()  # before this loads the machine
    seen: dict[str, list[Figures]] = {policy: [] for policy in POLICIES}
    with tempfile.TemporaryDirectory(prefix="dycoke-new-video-") as name:
        folder = Path(name)
        settings = {"DYCOKE_MODEL": options.model} if options.model else {}
        with running_service(folder, settings) as running:
            service = Service(running.url)
            _describe_scene(service, FIRST_SEED, "full", folder)  # the first answer warms up
            for place in range(options.number):
                for policy in POLICIES:
                    seed = FIRST_SEED + 1 + place
                    seen[policy].append(_describe_scene(service, seed, policy, folder))
    medians = {policy: _medians(figures) for policy, figures in seen.items()}
    print(f"{'seconds, median':>20}" + "".join(f"{policy:>10}" for policy in POLICIES) + "  ratio")
    for name in medians["full"]:
        full, compressed = (medians[policy][name] for policy in POLICIES)
        ratio = f"{full / compressed:7.2f}" if compressed else ""
        print(f"{name:>20}{full:10.3f}{compressed:10.3f}{ratio}")
    if options.json:
        print(json.dumps(about | {"number": options.number, "medians": medians}))
    return 0


def _describe_scene(service: Service, seed: int, policy: str, folder: Path) -> Figures:
    """Seconds until the first token and the end, as the client saw them, and of each stage."""
    path = folder / "scene.mp4"
    write_video(path, render(sample_scene(seed, split="test")))
    fields = {"question": PHRASINGS[DESCRIBE][0], "compression": policy, "max_tokens": 64}
    answer = Answer(time.perf_counter())
    clip = with_content_of_its_own(path.read_bytes(), policy.encode())
    with service.ask(fields, clip) as stream:
        for event in stream:
            answer.see(event)
    if answer.receipt is None or answer.ttft_s is None or answer.total_s is None:
        raise RuntimeError(f"no answer: {answer.error}")
    assert answer.receipt["cache"]["prefix"] == "miss", "a video that is not known yet"
    stages = {stage: float(answer.receipt["timings_s"][stage]) for stage in STAGES}
    return {"end to end": answer.total_s, "first token": answer.ttft_s} | stages


def _medians(figures: list[Figures]) -> Figures:
    return {name: statistics.median(each[name] for each in figures) for name in figures[0]}


if __name__ == "__main__":
    sys.exit(main())
