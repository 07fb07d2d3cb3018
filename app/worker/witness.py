"""Tells Redis how a worker ended, as the supervisor of its process saw it.

A process that is killed reports nothing, but its exit status says whether it ended itself or was
killed by a signal from outside. The kernel also uses SIGKILL when memory is short, which may be a
job's doing: if its count of such kills has risen, or cannot be read, the cause is unknown. If the
supervisor dies with its workers (a container, a machine), there is nobody to report the end, and
leases run out.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from app.errors import StoreUnavailableError
from app.settings import Settings
from app.store.client import connect
from app.store.keys import RedisKeys
from app.store.lost_workers import Fate, LostWorkers

FROM_OUTSIDE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # never a crash
PATIENCE_S = 60.0  # for Redis; by then most leases have run out
RETRY_S = 0.5
CGROUPS = Path("/sys/fs/cgroup")
VMSTAT = Path("/proc/vmstat")

logger = logging.getLogger(__name__)


def name_worker(child: int, life: str) -> str:
    """The id in Redis of one life of a machine's worker number `child`."""
    return f"{socket.gethostname()}-{child}-{life}"


class Witness:
    """Sees the ends of one pool's workers.

    Args:
        count_oom_kills: see `num_oom_kills`.
    """

    def __init__(
        self,
        settings: Settings,
        redis_url: str,
        *,
        count_oom_kills: Callable[[], int | None] | None = None,
    ) -> None:
        self._settings = settings
        self._redis_url = redis_url
        self._count_oom_kills = count_oom_kills or num_oom_kills
        self._at_start = self._count_oom_kills()
        # By child, at its last end: a kill counted since then may have been this child's, whoever
        # else has ended meanwhile.
        self._at_last_end: dict[int, int | None] = {}

    async def report(self, child: int, life: str, exit_code: int) -> None:
        """Records in Redis how a worker ended; retries for `PATIENCE_S` while Redis is away.

        Args:
            exit_code: negative for a signal.
        """
        worker_id, fate = name_worker(child, life), self.judge(child, exit_code)
        redis = connect(self._redis_url, max_connections=1)
        lost = LostWorkers(redis, RedisKeys(self._settings.redis_prefix))
        try:
            async with asyncio.timeout(PATIENCE_S):
                num_held = await self._persist(lost, worker_id, fate)
        except TimeoutError:
            logger.warning("nobody heard how a worker ended", extra={"worker_id": worker_id})
        else:
            said = {"worker_id": worker_id, "fate": fate.value, "held_jobs": num_held}
            logger.info("reported a worker's end", extra=said)
        finally:
            await redis.aclose()

    async def _persist(self, lost: LostWorkers, worker_id: str, fate: Fate) -> int:
        while True:
            try:
                return await lost.report(worker_id, fate, lease_s=self._settings.lease_s)
            except StoreUnavailableError:
                await asyncio.sleep(RETRY_S)

    def judge(self, child: int, exit_code: int) -> Fate:
        before, now = self._at_last_end.get(child, self._at_start), self._count_oom_kills()
        self._at_last_end[child] = now
        if exit_code == 0 or -exit_code in FROM_OUTSIDE:
            return Fate.OUTSIDE  # 0: it was drained
        if exit_code != -signal.SIGKILL:
            return Fate.OWN
        is_quiet = before is not None and before == now
        return Fate.OUTSIDE if is_quiet else Fate.UNKNOWN


def num_oom_kills() -> int | None:
    """How many processes the kernel has killed for want of memory: of this process's control group,
    or where groups do not say, of the whole machine. None where nothing does.
    """
    for path in (*memory_events(), VMSTAT):
        try:
            text = path.read_text()
        except OSError:
            continue
        counts = dict(line.split(" ", 1) for line in text.splitlines())
        if "oom_kill" in counts:
            return int(counts["oom_kill"])
    return None


def memory_events() -> list[Path]:
    """Of the group that this process is in, then of those around it, which count it too."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        if line.startswith("0::/"):
            group = CGROUPS / line.removeprefix("0::/")
            around = [folder for folder in group.parents if folder.is_relative_to(CGROUPS)]
            return [folder / "memory.events" for folder in (group, *around)]
    return []
