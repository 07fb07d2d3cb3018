"""Which API processes run: how many, and with which arguments."""

import socket
from collections.abc import Iterator

import pytest

from app.api import pool
from app.api.pool import Inherited, api_specs, num_processes
from app.process_table import ProcessTable
from app.settings import Settings


@pytest.mark.parametrize(
    ("num_cores", "expected"), [(1, 1), (4, 1), (8, 2), (11, 2), (32, 8), (256, 8)]
)
def test_a_whole_service_has_a_process_for_every_fourth_core(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, expected: int
) -> None:
    monkeypatch.setattr(pool, "num_usable_cores", lambda: num_cores)
    assert num_processes(Settings(), is_whole_service=True) == expected
    assert num_processes(Settings(), is_whole_service=False) == 1


def test_a_number_that_is_set_counts() -> None:
    settings = Settings(api_processes=3)
    assert num_processes(settings, is_whole_service=True) == 3
    assert num_processes(settings, is_whole_service=False) == 3


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        yield listener


def test_each_process_has_a_number_and_what_all_share(
    listener: socket.socket, process_table: ProcessTable
) -> None:
    settings = Settings(drain_timeout_s=7.0)
    specs = api_specs(settings, listener, process_table, env={"A": "b"}, stop_order=4)
    assert [spec.name for spec in specs] == ["api-0", "api-1"]
    for number, spec in enumerate(specs):
        inherited = Inherited(number, listener.fileno(), process_table.fd)
        assert spec.argv[-6:] == inherited.argv
        assert set(spec.pass_fds) == {listener.fileno(), process_table.fd}
        assert spec.stop_timeout_s > settings.drain_timeout_s
        assert (spec.env, spec.stop_order) == ({"A": "b"}, 4)


def test_a_process_that_dies_gives_back_what_it_counted(
    listener: socket.socket, process_table: ProcessTable
) -> None:
    row = process_table.take_row(1)
    row.add_incoming_bytes("client", 1000)
    assert process_table.incoming_bytes() == 1000
    spec = api_specs(Settings(), listener, process_table, env={})[1]
    spec.on_death()
    assert process_table.incoming_bytes() == 0
