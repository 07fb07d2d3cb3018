"""The GPU tests, with their own configuration: a process for each file, all at once.

The GPU-only tests, the kernels' tests, and the engine's conformance to its CPU backend, which
elsewhere run in Triton's interpreter or on plain PyTorch. Most of the time goes to the compiler,
which uses one core.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from loadtest.gpu.kit import Kit

ROOT = Path(__file__).parents[3]
_FOLDERS = ("tests/gpu", "tests/gpu_kernels")
_CONFORMANCE = ("invariants", "one_step_behind", "sharing", "host_cache", "failures", "engine")
_PYTEST = ("-m", "pytest", "-q", "-c", "tests/gpu/pytest.ini", "--confcutdir", "tests")
_OUTCOMES = ("passed", "failed", "skipped", "error", "errors", "deselected", "warning", "warnings")


def run_tests(kit: Kit) -> None:
    """Runs the tests. Raises RuntimeError if one failed or none ran on a GPU."""
    targets = ["tests/gpu"] if kit.is_dry else test_files()
    with tempfile.TemporaryDirectory() as directory:
        codes = run_all(targets, Path(directory), max(kit.seconds_left, 20.0))
        texts = {target: _log(Path(directory), target).read_text() for target in targets}
    log = kit.report.directory / "gpu-tests.log"
    log.write_text("\n".join(f"--- {target}\n{text}" for target, text in texts.items()))
    counts: Counter[str] = Counter()
    for target, code in codes.items():
        found = outcomes(texts[target])
        counts.update(found)
        kit.report.detail(target, {"exit_status": code, **found})
        if code != 0:
            kit.report.detail(f"{target}: end of the log", texts[target][-4000:])
            kit.report.note(f"{target}: {'out of time' if code is None else f'exit {code}'}")
    kit.report.note(", ".join(f"{n} {name}" for name, n in counts.items()) or "no summary")
    for name in ("passed", "failed", "skipped"):
        kit.report.record(f"gpu_tests_{name}", counts[name], "tests")
    if any(codes.values()) or None in codes.values() or not (kit.is_dry or counts["passed"]):
        raise RuntimeError(f"not all tests passed: see {log}")


def test_files() -> list[str]:
    files = [path for folder in _FOLDERS for path in sorted((ROOT / folder).glob("test_*.py"))]
    left_out = ["test_compile_ahead.py"]  # needs no GPU, and takes long
    if find_spec("hypothesis") is None:
        left_out.append("test_selection_properties.py")
    files = [path for path in files if path.name not in left_out]
    files += [ROOT / "tests/engine" / f"test_{name}.py" for name in _CONFORMANCE]
    return [str(path.relative_to(ROOT)) for path in files]


def run_all(targets: list[str], logs: Path, seconds: float) -> dict[str, int | None]:
    """Exit statuses; None: killed after `seconds`."""
    ends_at = time.monotonic() + seconds
    running = {}
    for target in targets:
        command = [sys.executable, *_PYTEST, target]
        if target.startswith("tests/engine/"):  # each test on either backend: its parameter
            command += ["-k", "cuda"]
        with _log(logs, target).open("w") as output:
            running[target] = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )
    codes: dict[str, int | None] = {}
    try:
        for target, process in running.items():
            try:
                codes[target] = process.wait(timeout=max(ends_at - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                codes[target] = None
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return codes


def _log(logs: Path, target: str) -> Path:
    return logs / (target.replace("/", "-").removesuffix(".py") + ".log")


def outcomes(text: str) -> dict[str, int]:
    """The counts in pytest's last summary line, or of its marks if the run was cut short."""
    for line in reversed(text.splitlines()):
        found = re.findall(rf"(\d+) ({'|'.join(_OUTCOMES)})\b", line)
        if found and " in " in line:
            return {name: int(number) for number, name in found}
    marks = "".join(re.findall(r"^([.FEsx]+)\s*(?:\[ *\d+%\])?$", text, re.MULTILINE))
    names = {".": "passed", "F": "failed", "E": "error", "s": "skipped"}
    return {name: marks.count(mark) for mark, name in names.items() if mark in marks}
