"""A whole service on one machine, `python -m app serve` with its own Redis and a real model, whose
parts are killed and paused, and now and then all of it at once.

One job at a time on each worker, so that answers do not depend on other jobs.
"""

import asyncio
import random
import signal
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from dycoke_core.tiny import CLIP
from tests.chaos import checks
from tests.chaos.clients import Client
from tests.chaos.fleet import PATIENCE_S, Part, free_port, has_workers, own_environment
from tests.chaos.ledger import Answer, Ledger, Question, sse_events
from tests.chaos.run import SETTLE_S, become_subreaper
from tests.random_checkpoint import build_random_checkpoint

NUM_WORKERS = 2
NUM_CLIENTS = 3
TEXTS = ("What moves?", "What color is it?", "Where does it go?", "How many are there?")
MAX_TOKENS = 200
# Found by a word of its command line; `serve` is all of them.
VICTIMS = ("redis-server", "worker", "api", "api", "worker", "serve")


class EmbeddedRun:
    """Args:
    folder: empty; for all that the run writes.
    """

    def __init__(self, folder: Path, *, seed: int, duration_s: float) -> None:
        self._seed = seed
        self._duration_s = duration_s
        self._folder = folder
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.ledger = Ledger()
        self._must_end = asyncio.Event()
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        settings = {
            "DYCOKE_PORT": str(port),
            "DYCOKE_DATA_DIR": str(folder / "data"),
            "DYCOKE_MODEL": str(folder / "model"),
            "DYCOKE_DTYPE": "float32",
            "DYCOKE_WORKERS": str(NUM_WORKERS),
            "DYCOKE_WORKER_THREADS": "1",
            "DYCOKE_MAX_RUNNING_JOBS": "1",
            "DYCOKE_API_PROCESSES": "2",
            "DYCOKE_LEASE_S": "2",
            "DYCOKE_HEARTBEAT_S": "2",
            "DYCOKE_DRAIN_TIMEOUT_S": "1",
            "DYCOKE_WORKER_METRICS_PORT": "0",
        }
        argv = (sys.executable, "-m", "app", "serve")
        env = own_environment() | settings
        self._service = Part("serve", argv, env, None, self.logs / "serve.log")

    async def __call__(self) -> bool:
        """Returns whether everything held."""
        become_subreaper()
        build_random_checkpoint(self._folder / "model")
        self._service.start()
        try:
            timeout = httpx.Timeout(30.0, connect=5.0)
            async with httpx.AsyncClient(timeout=timeout) as http:
                await self._run(http)
        finally:
            if self._service.is_running:
                self._service.send(signal.SIGKILL)
                await self._service.ended()
        self.ledger.check_that_it_was_chaos()
        return not self.ledger.problems

    async def _run(self, http: httpx.AsyncClient) -> None:
        await self._wait_until_ready(http)
        reply = await http.post(f"{self._url}/v1/videos", files={"video": CLIP.read_bytes()})
        video_id = reply.raise_for_status().json()["video_id"]
        questions = [await self._undisturbed(http, video_id, text) for text in TEXTS]
        self.ledger = Ledger()
        clips = [(CLIP.read_bytes(), video_id)]
        client = Client("embedded", http, [self._url], clips, self.ledger, self._must_end)
        is_over = asyncio.Event()
        asking = [
            asyncio.create_task(self._ask_all(client, questions, number, is_over))
            for number in range(NUM_CLIENTS)
        ]
        await self._rage()
        is_over.set()
        await self._wait_until_ready(http)
        _, late = await asyncio.wait(asking, timeout=SETTLE_S)
        if late:
            self.ledger.blame(f"{len(late)} clients wait for their answers in vain")
        self._must_end.set()
        await asyncio.gather(*asking)
        self._must_end.clear()
        await checks.check_answers(self.ledger, client, http, self._url)
        self._service.send(signal.SIGTERM)
        if (code := await self._service.ended()) != 0:
            self.ledger.blame(f"the service ended with {code} on SIGTERM")
        await checks.check_processes(self.ledger)
        checks.check_logs(self.logs, self.ledger)

    async def _wait_until_ready(self, http: httpx.AsyncClient) -> None:
        async with asyncio.timeout(3 * PATIENCE_S):
            while not await has_workers(http, self._url, NUM_WORKERS):
                await asyncio.sleep(0.2)

    async def _undisturbed(self, http: httpx.AsyncClient, video_id: str, text: str) -> Question:
        """A question with the answer that this machine gives when nothing happens."""
        body = {"video_id": video_id, "question": text, "max_tokens": MAX_TOKENS, "num_frames": 4}
        ids: list[int] = []
        async with http.stream("POST", f"{self._url}/v1/video/chat", json=body) as reply:
            async for event in sse_events(reply):
                if event.name == "token":
                    ids += event.data["token_ids"]
        assert event.name == "done", event
        expected = Answer(tuple(ids), event.data["text"])
        return Question(
            number=0,
            text=text,
            max_tokens=MAX_TOKENS,
            num_frames=4,
            clip=0,
            start_s=0.0,
            manner="stream",
            has_key=False,
            has_upload=False,
            leaves_after=0,
            api=0,
            expected=expected,
        )

    async def _ask_all(
        self, client: Client, questions: list[Question], number: int, is_over: asyncio.Event
    ) -> None:
        rng = random.Random(f"embedded {self._seed} {number}")
        while not is_over.is_set():
            await client.ask(rng.choice(questions))

    async def _rage(self) -> None:
        rng = random.Random(f"embedded {self._seed}")
        while self.ledger.now_s() < self._duration_s:
            await asyncio.sleep(rng.uniform(2.0, 5.0))
            victim, pauses, for_s = rng.choice(VICTIMS), rng.random() < 0.4, rng.uniform(0.5, 4.0)
            if victim == "serve":
                await self._kill_everything()
            else:
                await self._strike(victim, for_s if pauses else None, rng)
        self.ledger.note_fault("the faults are over")

    async def _strike(self, victim: str, pause_s: float | None, rng: random.Random) -> None:
        children = [p for p in self._service.processes()[1:] if _is(p, victim)]
        if not children:
            return
        child = rng.choice(children)
        what = f"{'kill' if pause_s is None else 'pause'} {victim}"
        self.ledger.num_faults[what] += 1
        self.ledger.note_fault(f"{what} pid {child.pid}" + (f" for {pause_s} s" if pause_s else ""))
        with suppress(psutil.NoSuchProcess):
            if pause_s is None:
                child.kill()
                return
            child.suspend()
            await asyncio.sleep(pause_s)
            child.resume()

    async def _kill_everything(self) -> None:
        self.ledger.num_faults["kill serve"] += 1
        self.ledger.note_fault("kill serve")
        self._service.send(signal.SIGKILL)
        await self._service.ended()
        self._service.start()


def _is(process: psutil.Process, word: str) -> bool:
    with suppress(psutil.NoSuchProcess):
        words = process.cmdline()
        # Redis' command line has its socket after its name.
        return word in words or (bool(words) and words[0].split(" ")[0].endswith(word))
    return False
