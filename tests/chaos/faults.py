"""What each kind of fault does to the service, and how it is undone."""

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import psutil
from redis import Redis as SyncRedis
from redis.exceptions import RedisError

from tests.chaos.fleet import Fleet, Part, children_of
from tests.chaos.ledger import Ledger
from tests.chaos.plan import KINDS, Fault

POLL_S = 0.004


class Faults:
    """Args:
    flood: asks many questions at once; does not wait for the answers.
    """

    def __init__(self, fleet: Fleet, ledger: Ledger, flood: Callable[[], None]) -> None:
        self.fleet = fleet
        self._ledger = ledger
        self._flood = flood
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, faults: list[Fault]) -> None:
        """Runs each fault at its time; several may overlap. Returns when all are undone."""
        for fault in faults:
            await asyncio.sleep(max(0.0, fault.at_s - self._ledger.now_s()))
            task = asyncio.create_task(self._strike(fault))
            self._tasks.add(task)
        await asyncio.gather(*self._tasks)

    async def _strike(self, fault: Fault) -> None:
        await _STRIKES[fault.kind](self, fault)

    def note(self, fault: Fault, target: str = "") -> None:
        self._ledger.num_faults[fault.kind] += 1
        length = f" for {fault.for_s:.2f} s" if fault.for_s else ""
        self._ledger.note_fault(f"{fault.kind} {target}{length}")

    # --- of parts ---

    async def kill_part(self, fault: Fault, part: Part) -> None:
        async with part.lock:
            if part.is_running:
                self.note(fault, part.name)
                part.send(signal.SIGKILL)
                await part.ended()
            await self._restart(fault, part)

    async def drain_part(self, fault: Fault, part: Part) -> None:
        async with part.lock:
            if part.is_running:
                self.note(fault, part.name)
                part.send(signal.SIGTERM)
                if await part.ended() is None:
                    self._ledger.blame(f"{part.name} does not end on SIGTERM")
                    part.send(signal.SIGKILL)
                    await part.ended()
            await self._restart(fault, part)

    async def pause_part(self, fault: Fault, part: Part) -> None:
        async with part.lock:
            if part.is_running:
                self.note(fault, part.name)
                await _pause(part.processes(), fault.for_s)

    async def _restart(self, fault: Fault, part: Part) -> None:
        await asyncio.sleep(fault.for_s)
        await self.fleet.up(part)
        self._ledger.note_fault(f"{part.name} started")

    # --- of their children ---

    async def signal_worker(self, fault: Fault, signum: signal.Signals) -> None:
        """To the worker itself; its pool survives and notices."""
        pool = self.fleet.pools[fault.number]
        async with pool.lock:
            for worker in pool.processes()[1:] if pool.is_running else []:
                self.note(fault, f"{pool.name}: pid {worker.pid}")
                _send(worker, signum)

    async def pause_worker(self, fault: Fault) -> None:
        pool = self.fleet.pools[fault.number]
        async with pool.lock:
            workers = pool.processes()[1:] if pool.is_running else []
            for worker in workers:
                self.note(fault, f"{pool.name}: pid {worker.pid}")
            await _pause(workers, fault.for_s)

    async def kill_api_process(self, fault: Fault) -> None:
        """One of several on a port; its supervisor survives and starts another."""
        for api in self.fleet.apis:
            async with api.lock:
                processes = api.processes()[1:] if api.is_running else []
                if processes:
                    victim = processes[fault.number % len(processes)]
                    self.note(fault, f"{api.name}: pid {victim.pid}")
                    _send(victim, signal.SIGKILL)

    async def kill_reader(self, fault: Fault) -> None:
        """Waits for a frame reader to come, for a while: they live for milliseconds."""
        apis = [api for api in self.fleet.apis if api.is_running]
        servers = [server.pid for api in apis for server in api.fork_servers()]
        give_up_at_s = self._ledger.now_s() + fault.for_s
        while self._ledger.now_s() < give_up_at_s:
            for reader in [pid for server in servers for pid in children_of(server)]:
                self.note(fault, f"pid {reader}, a reader")
                with suppress(ProcessLookupError):
                    os.kill(reader, signal.SIGKILL)
                return
            await asyncio.sleep(POLL_S)

    async def kill_fork_server(self, fault: Fault) -> None:
        api = self.fleet.apis[fault.number]
        servers = api.fork_servers() if api.is_running else []
        if servers:
            server = servers[int(10 * fault.at_s) % len(servers)]
            self.note(fault, f"{api.name}: pid {server.pid}")
            _send(server, signal.SIGKILL)

    # --- of links and of Redis ---

    async def hurt_link(self, fault: Fault, part: Part, how: str) -> None:
        assert part.link is not None
        self.note(fault, part.name)
        getattr(part.link, how)()
        await asyncio.sleep(fault.for_s)
        part.link.mend()

    async def pause_redis(self, fault: Fault) -> None:
        async with self.fleet.redis_lock:
            self.note(fault)
            self.fleet.redis.pause()
            await asyncio.sleep(fault.for_s)
            self.fleet.redis.resume()

    async def restart_redis(self, fault: Fault, end: Callable[[], None]) -> None:
        async with self.fleet.redis_lock:
            self.note(fault)
            end()
            await asyncio.sleep(fault.for_s)
            self.fleet.redis.start()

    async def command_redis(self, fault: Fault) -> None:
        async with self.fleet.redis_lock:
            self.note(fault)
            with (
                suppress(RedisError, OSError),
                SyncRedis(unix_socket_path=str(self.fleet.redis.socket)) as redis,
            ):
                if fault.kind == "flush scripts":
                    redis.script_flush()
                    return
                clients = [client["id"] for client in redis.client_list()]
                for client in random.Random(fault.at_s).sample(clients, len(clients) // 2):
                    redis.client_kill_filter(_id=client, skipme=True)

    async def flood(self, fault: Fault) -> None:
        self.note(fault)
        self._flood()


async def _pause(processes: list[psutil.Process], for_s: float) -> None:
    for process in processes:
        _send(process, signal.SIGSTOP)
    await asyncio.sleep(for_s)
    for process in processes:
        _send(process, signal.SIGCONT)


def _send(process: psutil.Process, signum: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signum)


_Strike = Callable[[Faults, Fault], Awaitable[None]]


def _of_api(what: Callable[..., Awaitable[None]], *args: str) -> _Strike:
    return lambda faults, fault: what(faults, fault, faults.fleet.apis[fault.number], *args)


def _of_pool(what: Callable[..., Awaitable[None]], *args: str) -> _Strike:
    return lambda faults, fault: what(faults, fault, faults.fleet.pools[fault.number], *args)


_STRIKES: dict[str, _Strike] = {
    "kill worker": lambda faults, fault: faults.signal_worker(fault, signal.SIGKILL),
    "kill pool": _of_pool(Faults.kill_part),
    "kill api": _of_api(Faults.kill_part),
    "kill api process": Faults.kill_api_process,
    "kill reader": Faults.kill_reader,
    "kill fork server": Faults.kill_fork_server,
    "pause worker": Faults.pause_worker,
    "pause worker past its lease": Faults.pause_worker,
    "pause api": _of_api(Faults.pause_part),
    "pause redis": Faults.pause_redis,
    "drain worker": lambda faults, fault: faults.signal_worker(fault, signal.SIGTERM),
    "drain pool": _of_pool(Faults.drain_part),
    "drain api": _of_api(Faults.drain_part),
    "kill connections": Faults.command_redis,
    "cut worker off": _of_pool(Faults.hurt_link, "cut"),
    "cut api off": _of_api(Faults.hurt_link, "cut"),
    "stall worker's link": _of_pool(Faults.hurt_link, "stall"),
    "stall api's link": _of_api(Faults.hurt_link, "stall"),
    "lose replies to worker": _of_pool(Faults.hurt_link, "lose_replies"),
    "lose replies to api": _of_api(Faults.hurt_link, "lose_replies"),
    "restart redis": lambda faults, fault: faults.restart_redis(fault, faults.fleet.redis.stop),
    "kill redis": lambda faults, fault: faults.restart_redis(fault, faults.fleet.redis.kill),
    "flush scripts": Faults.command_redis,
    "flood": Faults.flood,
}
assert tuple(_STRIKES) == KINDS
