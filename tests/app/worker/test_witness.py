"""What a worker process's end says about the jobs that it ran."""

import signal
from pathlib import Path

import pytest

from app.settings import Settings
from app.store.lost_workers import Fate
from app.worker import witness
from app.worker.witness import Witness, num_oom_kills


def judge(exit_code: int, *oom_kills: int | None) -> Fate:
    """A witness's verdict on an exit code, with these kills counted before and after."""
    counts = iter(oom_kills)
    witness = Witness(Settings(), "redis://nowhere", count_oom_kills=lambda: next(counts))
    return witness.judge(0, exit_code)


@pytest.mark.parametrize("exit_code", [1, 66, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS])
def test_a_crash_is_the_process_own_doing(exit_code: int) -> None:
    assert judge(exit_code, 0, 0) is Fate.OWN


@pytest.mark.parametrize("exit_code", [0, -signal.SIGTERM, -signal.SIGINT])
def test_one_that_was_told_to_go_is_not(exit_code: int) -> None:
    assert judge(exit_code, 0, 0) is Fate.OUTSIDE


@pytest.mark.parametrize(
    ("before", "after", "fate"),
    [(3, 3, Fate.OUTSIDE), (3, 4, Fate.UNKNOWN), (None, None, Fate.UNKNOWN)],
)
def test_a_sigkill_is_from_outside_unless_it_may_have_been_the_kernels(
    before: int | None, after: int | None, fate: Fate
) -> None:
    assert judge(-signal.SIGKILL, before, after) is fate


def test_two_workers_that_the_kernel_kills_together_are_both_in_doubt() -> None:
    counts = iter([0, 2, 2, 2])
    witness = Witness(Settings(), "redis://nowhere", count_oom_kills=lambda: next(counts))
    fates = [witness.judge(child, -signal.SIGKILL) for child in (0, 1, 1)]
    assert fates == [Fate.UNKNOWN, Fate.UNKNOWN, Fate.OUTSIDE]


def test_kills_are_counted_where_the_control_group_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    vmstat = tmp_path / "vmstat"
    monkeypatch.setattr(witness, "memory_events", lambda: [group / "memory.events"])
    monkeypatch.setattr(witness, "VMSTAT", vmstat)
    assert num_oom_kills() is None
    vmstat.write_text("nr_free_pages 12\noom_kill 5\n")
    assert num_oom_kills() == 5
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\n")
    assert num_oom_kills() == 1


def test_this_machine_says() -> None:
    assert witness.VMSTAT.exists() == (num_oom_kills() is not None)
