"""Open answers of all processes together."""

import pytest
from prometheus_client import CollectorRegistry

from app.api.connection.streams import StreamSlots
from app.errors import TooManyStreamsError
from app.metrics import ApiMetrics
from app.process_table import ProcessTable


def slots_of(table: ProcessTable, number: int, max_streams: int) -> StreamSlots:
    return StreamSlots(max_streams, table.take_row(number), ApiMetrics(CollectorRegistry()))


def test_limit_holds_for_all_processes_together(process_table: ProcessTable) -> None:
    here, there = (slots_of(process_table, number, 3) for number in range(2))
    taken = [here.take(), here.take(), there.take()]
    for slots in (here, there):
        with pytest.raises(TooManyStreamsError):
            slots.take()
    taken[0].release()
    taken[0].release()
    there.take()
    with pytest.raises(TooManyStreamsError):
        here.take()
    assert process_table.num_streams() == 3


def test_streams_of_a_dead_process_make_room(process_table: ProcessTable) -> None:
    here, there = (slots_of(process_table, number, 2) for number in range(2))
    there.take()
    there.take()
    with pytest.raises(TooManyStreamsError):
        here.take()
    process_table.note_death(1)
    here.take()
    here.take()
    with pytest.raises(TooManyStreamsError):
        here.take()
