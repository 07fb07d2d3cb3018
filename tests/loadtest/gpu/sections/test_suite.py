"""The suite on the GPU: its files, a process for each, and what it says of them."""

from pathlib import Path

import pytest

from loadtest.gpu.sections import suite

ROOT = Path(__file__).parents[4]


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
