"""Keeps the processes of one machine running: starts, watches, restarts and stops them.

When a child dies, the supervisor logs that and restarts it, after a wait that grows while it keeps
dying. If a child's first process exits with `EXIT_BAD_SETTINGS`, it would never run, so everything
stops. If the supervisor itself dies, even by SIGKILL, its children end (`app.dies_with_parent`).
They run in sessions of their own, so a Ctrl-C in the terminal reaches only the supervisor, which
stops them in order. A second signal hurries this up, a third kills what is left.
"""

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

EXIT_BAD_SETTINGS = 2
STDERR_FD = 2
KILL_TIMEOUT_S = 10.0  # how long to wait for a killed process to be reaped
TELL_TIMEOUT_S = 5.0  # how long to wait for `on_end` when everything stops
LIFE_VARIABLE = "SUPERVISOR_CHILD_LIFE"  # for `this_life`

_WRAPPER = str(Path(__file__).parent / "dies_with_parent.py")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A process to keep running.

    Args:
        env: added to the supervisor's own environment.
        drop_env: names of variables that it does not inherit.
        stop_order: children with lower numbers are stopped, and gone, before higher ones.
        stop_timeout_s: from SIGTERM to SIGKILL.
        hurry_timeout_s: the same from a second SIGTERM, which the child gets when the supervisor
            is asked twice to stop; 0: it is killed at once.
        parent_death_signal: what it gets when the supervisor dies.
        pass_fds: file descriptors that it inherits.
        on_end: called at each end with which life it was, as the child knows from `this_life`, and
            the exit code, negative for a signal's number. Not of what this supervisor has killed.
            A restart does not wait for it.
        on_death: called each time that it ends without having been asked to.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    drop_env: tuple[str, ...] = ()
    stop_order: int = 0
    stop_timeout_s: float = 10.0
    hurry_timeout_s: float = 0.0
    parent_death_signal: signal.Signals = signal.SIGKILL
    pass_fds: tuple[int, ...] = ()
    on_end: Callable[[str, int], Awaitable[None]] | None = None
    on_death: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The wait before a restart doubles with each death, up to a limit, until a child has lived
    for `stable_after_s`."""

    first_wait_s: float = 0.5
    max_wait_s: float = 30.0
    stable_after_s: float = 60.0


class Supervisor:
    """Args:
    on_stop: called when stopping begins. None of the first to be stopped is started after it.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        *,
        restarts: RestartPolicy | None = None,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        policy = restarts or RestartPolicy()
        self._on_stop = on_stop
        self._stop = asyncio.Event()
        self._is_hurried = False
        self._exit_code = 0
        self._stopping: list[_Child] = []  # children whose turn it is
        self._children = [_Child(spec, policy, self._on_bad_settings) for spec in specs]

    async def run(self) -> int:
        """Runs the children until SIGTERM, SIGINT or SIGHUP.

        Must be called on the main thread: children die with the thread that started them.

        Returns:
            The exit code: 0, or `EXIT_BAD_SETTINGS` when a child refused to start for that reason.
        """
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for signum in signals:
            loop.add_signal_handler(signum, self._on_signal)
        try:
            for child in self._children:
                child.start()
            await self._stop.wait()
            await self._stop_children()
        finally:
            for signum in signals:
                loop.remove_signal_handler(signum)
        return self._exit_code

    def _on_signal(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
        elif not self._is_hurried:
            self._is_hurried = True
            for child in self._stopping:
                child.hurry()
        else:
            for child in self._children:
                child.kill()

    def _on_bad_settings(self) -> None:
        self._exit_code = EXIT_BAD_SETTINGS
        self._stop.set()

    async def _stop_children(self) -> None:
        if self._on_stop is not None:
            self._on_stop()
        in_order = sorted(self._children, key=lambda child: child.spec.stop_order)
        for _, group in groupby(in_order, key=lambda child: child.spec.stop_order):
            self._stopping = list(group)
            await asyncio.gather(
                *(child.stop(is_hurried=self._is_hurried) for child in self._stopping)
            )


class _Child:
    """One process after another, until it is stopped."""

    def __init__(
        self, spec: ChildSpec, restarts: RestartPolicy, on_bad_settings: Callable[[], None]
    ) -> None:
        self.spec = spec
        self._restarts = restarts
        self._on_bad_settings = on_bad_settings
        self._stopping = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Future[None]] = set()
        self._is_killed = False  # by this supervisor

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_running(), name=self.spec.name)

    async def stop(self, *, is_hurried: bool) -> None:
        """Ends the process, by force when it takes too long."""
        assert self._task is not None
        self._stopping.set()
        self._send(signal.SIGTERM)
        if is_hurried:
            self.hurry()
        _, pending = await asyncio.wait([self._task], timeout=self.spec.stop_timeout_s)
        if pending:
            logger.warning("child did not stop in time", extra={"child": self.spec.name})
            self.kill()
            await asyncio.wait([self._task], timeout=KILL_TIMEOUT_S)
        if self._telling:
            await asyncio.wait(self._telling, timeout=TELL_TIMEOUT_S)

    def hurry(self) -> None:
        """Leaves a process that is being stopped less time."""
        if self.spec.hurry_timeout_s:
            self._send(signal.SIGTERM)
            asyncio.get_running_loop().call_later(self.spec.hurry_timeout_s, self.kill)
        else:
            self.kill()

    def kill(self) -> None:
        self._is_killed = True
        self._send(signal.SIGKILL)

    async def _keep_running(self) -> None:
        loop = asyncio.get_running_loop()
        wait_s = self._restarts.first_wait_s
        is_first = True
        while not self._stopping.is_set():
            started_at = loop.time()
            life = secrets.token_hex(4)
            exit_code = await self._run_once(life)
            self._tell_end(life, exit_code)
            if self._stopping.is_set():
                return
            if exit_code == EXIT_BAD_SETTINGS and is_first:
                logger.error("child refuses its settings", extra={"child": self.spec.name})
                self._on_bad_settings()
                return
            is_first = False
            if self.spec.on_death is not None:
                self.spec.on_death()
            if loop.time() - started_at >= self._restarts.stable_after_s:
                wait_s = self._restarts.first_wait_s
            logger.error(
                "child died; restarting it",
                extra={"child": self.spec.name, "exit_code": exit_code, "restart_in_s": wait_s},
            )
            await _wait(self._stopping, wait_s)
            wait_s = min(wait_s * 2, self._restarts.max_wait_s)

    def _tell_end(self, life: str, exit_code: int) -> None:
        if self.spec.on_end is not None and not self._is_killed:
            telling = asyncio.ensure_future(self.spec.on_end(life, exit_code))
            self._telling.add(telling)
            telling.add_done_callback(self._on_told)

    def _on_told(self, telling: "asyncio.Future[None]") -> None:
        self._telling.discard(telling)
        if not telling.cancelled() and (error := telling.exception()):
            logger.error("a child's end could not be reported", exc_info=error)

    async def _run_once(self, life: str) -> int:
        """Runs the process; returns its exit code, negative for a signal's number, 1 if the
        system has no room for a process just now."""
        spec = self.spec
        inherited = {n: value for n, value in os.environ.items() if n not in spec.drop_env}
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", _WRAPPER),
                *(str(os.getpid()), str(int(spec.parent_death_signal))),
                *spec.argv,
                env={**inherited, **spec.env, LIFE_VARIABLE: f"{os.getpid()}:{life}"},
                pass_fds=spec.pass_fds,
                stdout=STDERR_FD,  # some put there what belongs in the log
                start_new_session=True,
            )
        except OSError as error:
            logger.error(
                "child could not be started", extra={"child": spec.name, "errno": error.errno}
            )
            return 1
        logger.info("child started", extra={"child": spec.name, "child_pid": self._process.pid})
        if self._stopping.is_set():
            self._send(signal.SIGTERM)
        return await self._process.wait()

    def _send(self, signum: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signum)


def this_life() -> str:
    """A unique name for this process among the lives of its supervisor's children."""
    supervisor_pid, _, life = os.environ.get(LIFE_VARIABLE, "").partition(":")
    return life if supervisor_pid == str(os.getppid()) else secrets.token_hex(4)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
