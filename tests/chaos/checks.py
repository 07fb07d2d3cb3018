"""What must hold after the faults, whatever they were."""

import asyncio
import json
import os
import re
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
from redis import Redis as SyncRedis

from tests.chaos.clients import Client
from tests.chaos.fleet import Fleet
from tests.chaos.ledger import EXCUSED, JobEntry, Ledger

PATIENCE_S = 30.0
FROM_REDIS = re.compile(r"\d+:([CM] \d|signal-handler)")
FINAL_STATES = ("done", "error", "cancelled")
# Keys without a time to live: each is bounded by what it counts or by a budget. All others have a
# TTL.
LASTING = (
    "dead", "ended_bytes", "ended_jobs", "ended_sizes", "frame_bytes", "frame_sizes", "frame_uses",
    "frame_videos", "models", "workers",
)  # fmt: skip
LASTING_BY_MODEL = ("jobs",)


async def check_answers(ledger: Ledger, client: Client, http: httpx.AsyncClient, url: str) -> None:
    """Reads every accepted job's record and its whole log, and compares both with the question."""
    places = asyncio.Semaphore(8)

    async def check(entry: JobEntry) -> None:
        async with places:
            reply = await http.get(f"{url}/v1/jobs/{entry.job_id}")
            if reply.status_code != 200:
                ledger.blame(f"its record: {reply.status_code} {reply.text}", entry.job_id)
                return
            job = reply.json()
            _judge_end(job, entry, ledger)
            view = await client.read(entry, reader="the last reader")
            if view.final is None:
                ledger.blame("has no end", entry.job_id)
            elif (view.final.name == "done") != (job["state"] == "done"):
                ledger.blame(f"{job['state']}, but its log ends in {view.final}", entry.job_id)

    await asyncio.gather(*map(check, list(ledger.jobs.values())))


def _judge_end(job: dict[str, object], entry: JobEntry, ledger: Ledger) -> None:
    error = job["error"]
    entry.outcome = str(error["code"] if isinstance(error, dict) else job["state"])
    if entry.question.is_poison:
        if entry.outcome != "job_failed_repeatedly":
            ledger.blame(f"is poison, and ended as {entry.outcome}", entry.job_id)
        return
    excused = EXCUSED + ("cancelled",) * entry.may_be_cancelled
    if entry.outcome != "done" and entry.outcome not in excused:
        ledger.blame(f"ended as {entry.outcome}", entry.job_id)


def check_redis(redis: SyncRedis, ledger: Ledger) -> None:
    """Redis holds only records of ended jobs, and what is kept under a budget."""
    prefix = b"dycoke:"
    for key in sorted(redis.scan_iter(count=1000)):
        if not key.startswith(prefix):
            ledger.blame(f"a stray key: {key!r}")
            continue
        _check_key(redis, key, key.removeprefix(prefix).decode().split(":"), ledger)
    _check_sums(redis, ledger)


def _check_key(redis: SyncRedis, key: bytes, words: list[str], ledger: Ledger) -> None:
    kind = words[0]
    if kind == "job":
        state = (redis.hget(key, "state") or b"").decode()
        if state not in FINAL_STATES:
            ledger.blame(f"left in state '{state}': {redis.hgetall(key)}", words[1])
    if kind == "jobs" and (num_left := redis.xlen(key)):
        ledger.blame(f"{num_left} entries are left in the queue")
    if kind == "frames":
        if not redis.hexists("dycoke:frame_sizes", words[1]):
            ledger.blame(f"{key!r} is in no budget")
        return
    if kind == "video_frames":
        if redis.smembers(key) - set(redis.hkeys("dycoke:frame_sizes")):
            ledger.blame(f"{key!r} names frames that are in no budget")
        return
    if kind in LASTING or kind in LASTING_BY_MODEL:
        return
    if redis.pttl(key) == -1:
        ledger.blame(f"{key!r} has neither owner nor TTL")


def _check_sums(redis: SyncRedis, ledger: Ledger) -> None:
    for sizes, total in (("frame_sizes", "frame_bytes"), ("ended_sizes", "ended_bytes")):
        summed = sum(map(int, redis.hvals(f"dycoke:{sizes}")))
        counted = int(redis.get(f"dycoke:{total}") or 0)
        if summed != counted:
            ledger.blame(f"{total} is {counted}, {sizes} make {summed}")


def check_dead_letters(redis: SyncRedis, ledger: Ledger) -> None:
    for _, letter in redis.xrange("dycoke:dead"):
        job_id = letter[b"job_id"].decode()
        entry = ledger.jobs.get(job_id)
        if entry is None or not entry.question.is_poison:
            ledger.blame(f"buried, though innocent: {letter}", job_id)


async def check_idle(fleet: Fleet, ledger: Ledger) -> None:
    """The idle processes hold nothing of the jobs they ran."""

    def leaks() -> list[str]:
        found = []
        for api in fleet.apis:
            if num_buffers := api.num_frame_buffers():
                found.append(f"{api.name} holds {num_buffers} frame buffers")
            if readers := api.readers():
                found.append(f"{api.name} has frame readers: {readers}")
        return found

    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while leaks():
                await asyncio.sleep(0.2)
    for leak in leaks():
        ledger.blame(leak)


async def check_videos(
    http: httpx.AsyncClient, url: str, video_ids: list[str], ledger: Ledger
) -> None:
    """No video is in use any more: each can be deleted."""
    for video_id in video_ids:
        reply = await http.delete(f"{url}/v1/videos/{video_id}")
        if reply.status_code not in (204, 404):
            ledger.blame(f"{video_id} cannot be deleted: {reply.text}")


def check_files(fleet: Fleet, ledger: Ledger) -> None:
    for folder in (fleet.data_dir, fleet.temporary):
        for path in folder.rglob("*"):
            if path.is_file() and path != fleet.data_dir / "videos" / ".lock":
                ledger.blame(f"left: {path.relative_to(fleet.folder)}")


async def check_processes(ledger: Ledger, *, but: int | None = None) -> None:
    """No process is left of all that was started; orphans have become this process's children.

    Args:
        but: one that may still be there.
    """

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_ZOMBIE:
                    with suppress(ChildProcessError):
                        os.waitpid(process.pid, os.WNOHANG)
                elif process.pid != but:
                    found.append(process)
        return found

    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while left():
                await asyncio.sleep(0.1)
    for process in left():
        ledger.blame(f"left: process {process.pid}: {process.cmdline()}")


def check_logs(logs: Path, ledger: Ledger) -> None:
    """Every line but Redis' own is JSON, and none reports an internal error."""
    for path in sorted(logs.iterdir()):
        for text in path.read_text().splitlines():
            if FROM_REDIS.match(text):
                continue
            try:
                line = json.loads(text)
            except ValueError:
                ledger.blame(f"{path.name} has a line that is no JSON: {text[:200]}")
                continue
            if line["message"] == "internal error" or "traceback" in line:
                ledger.blame(f"{path.name}: {line['message']}: {line.get('traceback')}")
