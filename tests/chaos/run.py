"""One run: the service starts, clients ask while faults happen, every job ends, all is checked.

Nothing is asserted about speed, only about the final state. `settle_s` ends a run that hangs.
"""

import asyncio
import ctypes
import sys
from pathlib import Path

import httpx
from redis import Redis as SyncRedis

from tests.chaos import checks
from tests.chaos.clients import Client
from tests.chaos.faults import Faults
from tests.chaos.fleet import Fleet
from tests.chaos.ledger import Ledger
from tests.chaos.plan import NUM_CLIPS, plan_faults, plan_questions
from tests.video_clips import make_clip

LEASE_S = 1.5
NUM_CLIENTS = 8
FLOOD_QUESTIONS = 30
SETTLE_S = 180.0  # for all that was accepted to end, once the faults are over
PR_SET_CHILD_SUBREAPER = 36


class Run:
    """Args:
    folder: empty; for all that the run writes.
    """

    def __init__(self, folder: Path, *, seed: int, duration_s: float) -> None:
        self._seed = seed
        self._duration_s = duration_s
        self._fleet = Fleet(folder, lease_s=LEASE_S)
        self.logs = self._fleet.logs
        self.ledger = Ledger()
        self._must_end = asyncio.Event()
        self._flooding: set[asyncio.Task[None]] = set()
        self._num_floods = 0

    async def __call__(self) -> bool:
        """Returns whether everything held."""
        become_subreaper()
        try:
            await self._fleet.start()
            timeout = httpx.Timeout(20.0, connect=5.0)
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(timeout=timeout, limits=limits) as http:
                await self._run(http)
        finally:
            await self._fleet.close()
        self.ledger.check_that_it_was_chaos()
        return not self.ledger.problems

    async def _run(self, http: httpx.AsyncClient) -> None:
        clips = await self._upload_clips(http)
        self.ledger = Ledger()  # its clock begins here
        client = self._client("clients", http, clips)
        await self._rage(client)
        await self._settle(client)
        with SyncRedis(unix_socket_path=str(self._fleet.redis.socket)) as redis:
            self._note_unknown_jobs(redis)
            await checks.check_answers(self.ledger, client, http, self._fleet.urls[0])
            checks.check_dead_letters(redis, self.ledger)
            await checks.check_idle(self._fleet, self.ledger)
            video_ids = [video_id for _, video_id in clips]
            await checks.check_videos(http, self._fleet.urls[0], video_ids, self.ledger)
            await self._stop()
            checks.check_redis(redis, self.ledger)
        checks.check_files(self._fleet, self.ledger)
        checks.check_logs(self._fleet.logs, self.ledger)

    async def _upload_clips(self, http: httpx.AsyncClient) -> list[tuple[bytes, str]]:
        clips = []
        for number in range(NUM_CLIPS):
            path = self._fleet.folder / f"clip-{number}.mp4"
            make_clip(path, num_frames=30, width=64, height=48, seed=number)
            content = path.read_bytes()
            url = f"{self._fleet.urls[0]}/v1/videos"
            reply = await http.post(url, files={"video": content})
            reply.raise_for_status()
            clips.append((content, reply.json()["video_id"]))
        return clips

    def _client(self, name: str, http: httpx.AsyncClient, clips: list[tuple[bytes, str]]) -> Client:
        return Client(name, http, self._fleet.urls, clips, self.ledger, self._must_end)

    async def _rage(self, client: Client) -> None:
        is_over = asyncio.Event()
        clients = [
            asyncio.create_task(client.ask_all(plan_questions(self._seed, f"c{i}"), is_over))
            for i in range(NUM_CLIENTS)
        ]
        faults = Faults(self._fleet, self.ledger, lambda: self._flood(client))
        await faults.run(plan_faults(self._seed, self._duration_s, LEASE_S))
        is_over.set()
        self.ledger.note_fault("the faults are over")
        _, late = await asyncio.wait([*clients, *self._flooding], timeout=SETTLE_S)
        if late:
            self.ledger.blame(f"{len(late)} clients wait for their answers in vain")
        self._must_end.set()
        _, hanging = await asyncio.wait([*clients, *self._flooding], timeout=SETTLE_S)
        for task in hanging:
            task.cancel()
        for outcome in await asyncio.gather(*clients, *self._flooding, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    def _flood(self, client: Client) -> None:
        self._num_floods += 1
        questions = plan_questions(self._seed, f"flood{self._num_floods}")
        for _ in range(FLOOD_QUESTIONS):
            self._flooding.add(asyncio.create_task(client.ask(next(questions))))

    async def _settle(self, client: Client) -> None:
        """Waits until the service is whole again and every job has ended."""
        await self._fleet.wait_until_ready()
        self._must_end.clear()
        try:
            async with asyncio.timeout(SETTLE_S):
                while self._live_jobs():
                    await asyncio.sleep(0.2)
        except TimeoutError:
            for job_id in self._live_jobs():
                self.ledger.blame("does not end", job_id)
            self._must_end.set()

    def _live_jobs(self) -> list[str]:
        with SyncRedis(unix_socket_path=str(self._fleet.redis.socket)) as redis:
            return [job_id.decode() for job_id in redis.zrange("dycoke:live", 0, -1)]

    def _note_unknown_jobs(self, redis: SyncRedis) -> None:
        """Jobs whose creation the client never heard of must end like any other."""
        known = set(self.ledger.jobs)
        keys = redis.scan_iter("dycoke:job:*", count=1000)
        unknown = {key.decode().rpartition(":")[2] for key in keys} - known
        self.ledger.num_unknown_jobs = len(unknown)

    async def _stop(self) -> None:
        for name, code in (await self._fleet.stop()).items():
            if code != 0:
                self.ledger.blame(f"{name} ended with {code} on SIGTERM")
        await checks.check_processes(self.ledger, but=self._fleet.redis.pid)


def become_subreaper() -> None:
    """Orphaned descendants become this process's own children, so that none can hide."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        sys.exit("cannot become the reaper of orphans")
