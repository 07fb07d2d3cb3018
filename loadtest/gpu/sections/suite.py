"""The GPU tests, in a process of their own with a configuration of their own."""

import re
import subprocess
import sys
from pathlib import Path

from loadtest.gpu.kit import Kit

ROOT = Path(__file__).parents[3]
_OUTCOMES = ("passed", "failed", "skipped", "error", "errors", "deselected", "warning", "warnings")


def run_tests(kit: Kit) -> None:
    """Raises RuntimeError: a test failed, or none ran on a GPU."""
    # What is compiled ahead needs no GPU, and takes long.
    folders = ["tests/gpu", "tests/gpu_kernels", "--ignore=tests/gpu_kernels/test_compile_ahead.py"]
    if kit.is_dry:
        folders = folders[:1]
    command = [sys.executable, "-m", "pytest", "-q", "-c", "tests/gpu/pytest.ini", *folders]
    log = kit.report.directory / "gpu-tests.log"
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=max(kit.seconds_left, 20.0),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
            kit.report.note("the tests ran out of time")
    text = log.read_text()
    counts = outcomes(text)
    kit.report.detail("counts", counts)
    kit.report.detail("log tail", text[-6000:])
    kit.report.note(", ".join(f"{n} {name}" for name, n in counts.items()) or "no summary")
    for name in ("passed", "failed", "skipped"):
        kit.report.record(f"gpu_tests_{name}", counts.get(name, 0), "tests")
    has_run = kit.is_dry or counts.get("passed", 0) > 0
    if code != 0 or not has_run:
        raise RuntimeError(f"pytest ended with {code}: see {log}")


def outcomes(text: str) -> dict[str, int]:
    """The counts of pytest's last summary line; of a run that was cut short, of its marks."""
    for line in reversed(text.splitlines()):
        found = re.findall(rf"(\d+) ({'|'.join(_OUTCOMES)})\b", line)
        if found and " in " in line:
            return {name: int(number) for number, name in found}
    marks = "".join(re.findall(r"^([.FEsx]+)\s*(?:\[ *\d+%\])?$", text, re.MULTILINE))
    names = {".": "passed", "F": "failed", "E": "error", "s": "skipped"}
    return {name: marks.count(mark) for mark, name in names.items() if mark in marks}
