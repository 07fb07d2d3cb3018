"""Starting the API's frame readers."""

from pathlib import Path
from typing import Any

import pytest

from app.api import app as api_app
from app.api import server
from app.api.app import START_TRIES, ReadersDoNotStartError, create_app
from app.settings import Settings
from app.supervisor import EXIT_BAD_SETTINGS
from dycoke_core.errors import SandboxUnavailableError
from dycoke_core.video import FrameReaders


class Starting:
    """Stands in for `FrameReaders`: the first ones are killed while they start."""

    def __init__(self, num_killed: int) -> None:
        self.num_killed = num_killed
        self.num_started = 0

    def __call__(self, *args: Any, **kwargs: Any) -> FrameReaders:
        self.num_started += 1
        if self.num_started <= self.num_killed:
            raise SandboxUnavailableError("cannot be started here") from ValueError("no reply")
        self.readers = FrameReaders(*args, **kwargs)
        return self.readers


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(redis_url="redis://localhost", data_dir=tmp_path, port=0)


async def test_reader_killed_while_the_api_starts_is_started_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = Starting(num_killed=1)
    monkeypatch.setattr(api_app, "FrameReaders", starting)
    create_app(settings)
    assert starting.num_started == 2
    await starting.readers.aclose()


def test_readers_that_never_start_are_no_matter_of_settings(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = Starting(num_killed=START_TRIES)
    monkeypatch.setattr(api_app, "FrameReaders", starting)
    with pytest.raises(ReadersDoNotStartError):
        create_app(settings)
    starting.num_started = 0
    assert server.run(settings) not in (0, EXIT_BAD_SETTINGS)


def test_system_that_cannot_confine_them_is(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> FrameReaders:
        raise SandboxUnavailableError("no Landlock")

    monkeypatch.setattr(api_app, "FrameReaders", refuse)
    assert server.run(settings) == EXIT_BAD_SETTINGS
