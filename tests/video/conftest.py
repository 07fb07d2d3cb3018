"""Fork servers and frame readers for the tests, and a look at what they leave behind."""

import gc
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from dycoke_core.video import FrameReaders, ReadLimits
from dycoke_core.video.fork_client import ForkServer
from dycoke_core.video.forked_child import Confinement

CONFINEMENT = Confinement(memory_bytes=600 * 2**20, cpu_s=2, is_strict=True)
_ROOT = Path(__file__).parents[2]


@pytest_asyncio.fixture
async def hostile(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ForkServer]:
    """A fork server whose children do what `hostile_tasks` says."""
    monkeypatch.setenv("PYTHONPATH", str(_ROOT))
    server = ForkServer("tests.video.hostile_tasks", CONFINEMENT)
    yield server
    await server.aclose()


@pytest_asyncio.fixture
async def readers() -> AsyncIterator[FrameReaders]:
    readers = FrameReaders(ReadLimits(), max_readers=2)
    yield readers
    await readers.aclose()


@pytest.fixture
def video_fd(tmp_path: Path) -> Iterator[int]:
    """What hostile tasks get as their video: a file with the text "moving pictures"."""
    path = tmp_path / "video"
    path.write_text("moving pictures")
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


_bystanders: set[int] = set()


@pytest.fixture(scope="module", autouse=True)
def note_bystanders() -> None:
    """Other tests' servers, which may run at the same time."""
    _bystanders.update(process.pid for process in psutil.Process().children(recursive=True))


def descendants() -> list[psutil.Process]:
    """The living processes below this one that these tests started. A zombie counts."""
    processes = psutil.Process().children(recursive=True)
    return [process for process in processes if process.pid not in _bystanders]


@contextmanager
def leaving_nothing_behind() -> Iterator[None]:
    """Fails if the block opens descriptors or starts processes that outlive it. Frames have a
    descriptor for as long as they are held."""
    gc.collect()
    before, pids = open_files(), {process.pid for process in descendants()}
    yield
    gc.collect()
    assert {process.pid for process in descendants()} <= pids
    after = open_files()
    assert len(after) <= len(before), sorted(set(after.items()) - set(before.items()))


def open_files() -> dict[str, str]:
    """What each descriptor of this process leads to."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # of the listing itself
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found
