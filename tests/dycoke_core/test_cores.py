"""The usable cores, with control groups as files of a folder."""

from pathlib import Path

import pytest

from dycoke_core.cores import num_usable_cores


@pytest.fixture(autouse=True)
def machine_of_32_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(32)))


def write_v1(root: Path, quota_us: str, period_us: str) -> None:
    (root / "cpu").mkdir()
    (root / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota_us}\n")
    (root / "cpu" / "cpu.cfs_period_us").write_text(f"{period_us}\n")


@pytest.mark.parametrize(
    ("cpu_max", "num_cores"),
    [
        ("400000 100000", 4),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("100000 50000", 2),
        ("9900000 100000", 32),
        ("max 100000", 32),
        ("nonsense", 32),
        ("100000 0", 32),
    ],
)
def test_quota_of_cgroup_v2_bounds_the_cores(tmp_path: Path, cpu_max: str, num_cores: int) -> None:
    (tmp_path / "cpu.max").write_text(f"{cpu_max}\n")
    assert num_usable_cores(tmp_path) == num_cores


@pytest.mark.parametrize(
    ("quota_us", "period_us", "num_cores"),
    [("400000", "100000", 4), ("150000", "100000", 1), ("-1", "100000", 32), ("", "", 32)],
)
def test_quota_of_cgroup_v1_bounds_the_cores(
    tmp_path: Path, quota_us: str, period_us: str, num_cores: int
) -> None:
    write_v1(tmp_path, quota_us, period_us)
    assert num_usable_cores(tmp_path) == num_cores


def test_without_a_control_group_the_affinity_counts(tmp_path: Path) -> None:
    assert num_usable_cores(tmp_path) == 32
