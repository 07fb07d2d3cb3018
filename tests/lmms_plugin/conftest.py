from pathlib import Path

import pytest

from tests.lmms_plugin.running import Doc, make_docs, write_task


@pytest.fixture(scope="session")
def docs(tmp_path_factory: pytest.TempPathFactory) -> list[Doc]:
    return make_docs(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def task(docs: list[Doc], tmp_path: Path) -> Path:
    """A folder with a task about `docs`."""
    folder = tmp_path / "task"
    write_task(folder, docs)
    return folder
