"""The parent's side of a fork server: runs tasks in its children, each with a time limit.

Knows nothing of videos. Used by one event loop.
"""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from typing import Any

from dycoke_core.errors import SandboxUnavailableError
from dycoke_core.video.child import MAX_MESSAGE_BYTES
from dycoke_core.video.forked_child import Confinement, ForkedChild, TaskFailure

logger = logging.getLogger(__name__)

MAX_TASKS = 1000  # of one server: starting another takes a quarter of a second
_START_PATIENCE_S = 60.0
KILL_PATIENCE_S = 5.0
# All that a reader sees of the environment; the rest carries keys and passwords.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL")


class ForkServer:
    """Starts the server of one module of tasks, restarts it if it dies, has it run tasks.

    All children of a server have its layout of addresses, which a child that is made to crash may
    tell something of: after a crash the server is replaced as soon as it has no other child, and so
    it is after `MAX_TASKS`.
    """

    def __init__(self, module: str, confinement: Confinement) -> None:
        self._module = module
        self._confinement = confinement
        self._ids = count()
        self._children: dict[int, ForkedChild] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # watches the control socket
        self._has_crashed = False  # a child of this server
        self._num_tasks = 0  # that this server was given

    def start(self) -> None:
        """Starts the process and returns at once; tasks sent to it from now on wait for it."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        command = [sys.executable, "-m", "dycoke_core.video.fork_server", str(theirs.fileno())]
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        with theirs, self._closing_unless_started():
            # Neither numpy nor malloc may take memory for each of the machine's cores.
            own = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
            self._process = subprocess.Popen(
                [*command, self._module],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment | own,
            )

    @contextmanager
    def _closing_unless_started(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._let_go()
            raise

    def observe_refusals(self) -> dict[str, bool]:
        """Has a child, confined as far as this system can, try what it must not. Blocks.

        Only between `start` and the first `run`.

        Raises:
            SandboxUnavailableError: no child could be asked.
        """
        control = self._control
        assert control is not None
        confinement = asdict(self._confinement) | {"is_strict": False}
        task = {
            "name": "observe_refusals",
            "params": {"max_threads": self._confinement.max_threads},
            "num_threads": 1,
            "confinement": confinement,
        }
        read_end, write_end = os.pipe()
        try:
            with open(__file__, "rb") as readable:
                self._send_run(next(self._ids), task, [readable.fileno(), write_end])
            control.settimeout(_START_PATIENCE_S)
            control.recv(MAX_MESSAGE_BYTES)
            control.setblocking(False)
            refusals: dict[str, bool] = json.loads(os.read(read_end, MAX_MESSAGE_BYTES))["result"]
        except (OSError, KeyError, ValueError) as error:
            raise SandboxUnavailableError("frame readers cannot be started here") from error
        finally:
            os.close(read_end)
        return refusals

    async def run(
        self,
        name: str,
        params: Mapping[str, Any],
        video_fd: int,
        *,
        timeout_s: float,
        num_threads: int = 1,
        pixels: tuple[int, Sequence[int]] | None = None,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> Any:
        """Runs the task `name` in a child and returns its result, which may be any JSON.

        However this ends, the child has ended or is killed; cancelling kills it at once.

        Args:
            num_threads: how many it may decode with; each brings its own share of CPU time.
            pixels: descriptor and shape of a frame buffer for the child to write.

        Raises:
            TaskFailure: there is no result.
        """
        try:
            self._watch()
            read_end, write_end = os.pipe()
        except OSError as error:
            raise TaskFailure("no_process", "no server") from error
        confinement = self._confinement.with_threads(num_threads)
        task: dict[str, Any] = {
            "name": name,
            "params": params,
            "num_threads": num_threads,
            "confinement": asdict(confinement),
        }
        pixel_fds = []
        if pixels is not None:
            pixel_fds = [pixels[0]]
            task["shape"] = pixels[1]
        loop = asyncio.get_running_loop()
        task_id = next(self._ids)
        self._num_tasks += 1
        os.set_blocking(read_end, False)
        child = ForkedChild(confinement, read_end, on_progress, loop.create_future())
        self._children[task_id] = child
        try:
            self._send_run(task_id, task, [video_fd, write_end, *pixel_fds])
            loop.add_reader(read_end, self._on_reply, task_id, child)
            return await self._outcome(task_id, child, timeout_s)
        except TaskFailure as failure:
            self._has_crashed = self._has_crashed or failure.code == "crash"
            raise
        finally:
            if not child.ended.done():
                self._kill(task_id)
            loop.remove_reader(read_end)
            os.close(read_end)
            is_worn = self._has_crashed or self._num_tasks >= MAX_TASKS
            if is_worn and not self._children:
                self._end_abruptly()

    async def aclose(self) -> None:
        """Ends the server, which ends and reaps its children first."""
        process = self._let_go()
        if process is not None:
            await asyncio.to_thread(_await_end, process)

    def close(self) -> None:
        """As `aclose`, blocking."""
        process = self._let_go()
        if process is not None:
            _await_end(process)

    async def _outcome(self, task_id: int, child: ForkedChild, timeout_s: float) -> Any:
        is_late = not await _is_done(child.ended, timeout_s)
        if is_late:
            self._kill(task_id)
            if not await _is_done(child.ended, KILL_PATIENCE_S):
                self._end_abruptly()
            raise TaskFailure("timeout")
        child.read_replies()  # what came between the last look and the end
        return child.result()

    def _watch(self) -> None:
        if self._control is None:
            self.start()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            assert self._control is not None
            loop.add_reader(self._control, self._on_control, self._control)
            self._loop = loop

    def _on_reply(self, task_id: int, child: ForkedChild) -> None:
        if not child.read_replies():
            # Not `self._loop`, which is gone when the server has been let go: this may come later.
            asyncio.get_running_loop().remove_reader(child.reply_fd)
            if child.is_babbling:
                self._kill(task_id)

    def _on_control(self, control: socket.socket) -> None:
        try:
            payload = control.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            payload = b""
        if not payload:
            logger.error("the server of frame readers died; it is started again when needed")
            self._end_abruptly()
            return
        ended = json.loads(payload)
        child = self._children.pop(ended["exited"])
        if not child.ended.done():
            child.ended.set_result(ended)

    def _send_run(self, task_id: int, task: Mapping[str, Any], fds: Sequence[int]) -> None:
        """Hands the task and its descriptors over; closes the writing end of the reply pipe."""
        try:
            self._send({"run": task_id, "task": task}, fds)
        finally:
            os.close(fds[1])

    def _kill(self, task_id: int) -> None:
        if self._control is not None:
            self._send({"kill": task_id}, [])

    def _send(self, message: Mapping[str, Any], fds: Sequence[int]) -> None:
        assert self._control is not None
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], fds)
        except OSError:  # dead, or so stuck that its queue is full
            self._end_abruptly()

    def _end_abruptly(self) -> None:
        """For a server that is dead or does not answer; its end is its children's."""
        process = self._let_go()
        if process is not None:
            process.kill()
            process.wait()

    def _let_go(self) -> subprocess.Popen[bytes] | None:
        """Closes the connection, which ends the server, and wakes whatever waits for a child.

        Returns the process, whose end is still to be awaited.
        """
        if self._control is not None:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._control)
            self._control.close()
        process, self._process = self._process, None
        self._control = self._loop = None
        self._has_crashed = False
        self._num_tasks = 0
        for child in self._children.values():
            if not child.ended.done():
                child.ended.set_result({})
        self._children.clear()
        return process


async def _is_done(future: asyncio.Future[Any], timeout_s: float) -> bool:
    await asyncio.wait([future], timeout=max(0.0, timeout_s))
    return future.done()


def _await_end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(KILL_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
