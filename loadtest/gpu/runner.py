"""Runs sections one after the other, each within its time, even if one of them fails.

On a GPU, groups of sections run in separate processes: a kernel that writes where it must not
breaks its process, and the next sections need another. What a section has recorded is on disk by
then; see `loadtest.gpu.report`.
"""

import gc
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch

from dycoke_core.engine.faults import has_broken_device
from loadtest.gpu.kit import Kit, Section
from loadtest.gpu.report import Report, SectionRun

LOST_DEVICE = 3  # a child's exit code
_GRACE = 1.5  # times its budget, after which a section is interrupted
_KILL_GRACE_S = 30.0  # beyond all budgets, after which a process is killed

# Runs a child for these sections and this many seconds; returns its exit code; None if killed.
Spawn = Callable[[Sequence[Section], float], int | None]


class SectionTimeout(Exception):
    """A section took far longer than its budget."""


def run_here(kit: Kit, sections: Sequence[Section], seconds: float) -> bool:
    """Runs sections in this process.

    Returns:
        False if the device is lost; the sections after the failed one have not run.
    """
    ends_at = time.monotonic() + seconds
    for index, section in enumerate(sections):
        shares = sum(other.share for other in sections[index:])
        budget = max(ends_at - time.monotonic(), 0.0) * section.share / shares
        if not _run_section(kit, section, budget):
            return False
    return True


def _run_section(kit: Kit, section: Section, budget: float) -> bool:
    """Runs one section; False if the device is lost."""
    print(f"{section.name} ({budget:.0f} s):", flush=True)
    report = kit.report
    run = report.sections[section.name] = SectionRun("running", budget)
    report.current = section.name
    report.save()
    started_at = time.monotonic()
    kit.deadline = started_at + budget
    is_lost = False
    try:
        with torch.inference_mode(), interrupted_after(budget * _GRACE + 10.0):
            section.run(kit)
        run.status = "ok"
    except Exception as error:
        run.status, run.traceback = "failed", traceback.format_exc()
        is_lost = kit.device.type == "cuda" and (has_broken_device(error) or _is_lost(kit.device))
        print(f"  failed: {type(error).__name__}: {error}", flush=True)
    run.seconds = time.monotonic() - started_at
    report.save()
    if kit.device.type == "cuda" and not is_lost:
        gc.collect()
        torch.cuda.empty_cache()  # the next section may need it in larger pieces
    return not is_lost


def _is_lost(device: torch.device) -> bool:
    """Whether the device is lost: after a kernel's fault every further call fails."""
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raises SectionTimeout in the main thread; cannot interrupt a call that never returns."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise SectionTimeout(f"interrupted after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def run_in_processes(
    report: Report, sections: Sequence[Section], seconds: float, spawn: Spawn
) -> None:
    """Runs each group of sections in a process; if it dies, the rest run in another."""
    ends_at = time.monotonic() + seconds
    pending = list(sections)
    while pending:
        group = [s for s in pending if s.process == pending[0].process]
        seconds_left = max(ends_at - time.monotonic(), 0.0)
        share = sum(s.share for s in group) / sum(s.share for s in pending)
        code = spawn(group, seconds_left * share)
        report.load()
        undone = [s for s in group if not _is_done(report, s)]
        # A process that lost its device exits after the section that did it, which is already
        # recorded as failed; any other end is charged to the section that was running.
        if undone and (code != LOST_DEVICE or len(undone) == len(group)):
            run = report.sections.setdefault(undone[0].name, SectionRun("running", 0.0))
            run.status = "failed"
            run.traceback = f"its process {'was killed' if code is None else f'ended with {code}'}"
            report.save()
        pending = [s for s in pending if not _is_done(report, s)]


def _is_done(report: Report, section: Section) -> bool:
    run = report.sections.get(section.name)
    return run is not None and run.status != "running"


def spawn_child(report: Report, sections: Sequence[Section], seconds: float) -> int | None:
    command = [sys.executable, "-m", "loadtest.gpu", "--out", str(report.directory), "--child"]
    command += ["--minutes", str(seconds / 60), "--only", *(s.name for s in sections)]
    if report.is_dry:
        command.append("--dry-run")
    limit = seconds * _GRACE + 10.0 * len(sections) + _KILL_GRACE_S
    try:
        return subprocess.run(command, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:  # which has killed it
        return None
