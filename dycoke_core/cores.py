"""How many cores this process may use: the smaller of its affinity and its control group's quota.

A container's limit (`cpus: 4`, a pod's CPU limit) is a quota of time, which the affinity does not
show: all of the host's cores are visible, and threads beyond the quota only delay one another.

Not covered: quotas of groups above the container's own, which it cannot see.
"""

import os
from contextlib import suppress
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")  # inside a container: its own group


def num_usable_cores(cgroup_root: Path = CGROUP_ROOT) -> int:
    """At least one; of a fractional quota the whole cores."""
    num_cores = len(os.sched_getaffinity(0))
    quota = _cgroup_v2_quota(cgroup_root) or _cgroup_v1_quota(cgroup_root)
    return num_cores if quota is None else max(1, min(num_cores, int(quota)))


def _cgroup_v2_quota(root: Path) -> float | None:
    """Cores; None without a limit, or without a v2 hierarchy."""
    with suppress(OSError, ValueError):
        quota_us, period_us = (root / "cpu.max").read_text().split()
        return _cores(int(quota_us), int(period_us))  # "max": a ValueError
    return None


def _cgroup_v1_quota(root: Path) -> float | None:
    """Cores; None without a limit (-1), or without a v1 hierarchy."""
    with suppress(OSError, ValueError):
        folder = root / "cpu"
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        return _cores(quota_us, int((folder / "cpu.cfs_period_us").read_text()))
    return None


def _cores(quota_us: int, period_us: int) -> float | None:
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None
