"""Which API processes this machine runs: several on one port, each with a number in one table.

They inherit one listening socket, which the supervisor keeps open. A connection that is not yet
accepted belongs to none of them, so it survives the death of any process and the others accept it.
"""

import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from app.process_table import ProcessTable
from app.settings import Settings
from app.supervisor import ChildSpec
from dycoke_core.cores import num_usable_cores

CORES_PER_PROCESS = 4  # the others are for workers, frame readers and Redis
MAX_DEFAULT_PROCESSES = 8
STOP_MARGIN_S = 5.0  # in addition to a process's drain
# A second signal ends open answers, and leaves the time to say so to Redis.
HURRY_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a process inherits from its supervisor, as arguments of its command."""

    number: int
    listener_fd: int
    table_fd: int

    @property
    def argv(self) -> tuple[str, ...]:
        return (
            *("--child", str(self.number)),
            *("--listener", str(self.listener_fd)),
            *("--table", str(self.table_fd)),
        )


def num_processes(settings: Settings, *, is_whole_service: bool) -> int:
    """How many processes to run, unless set: by cores where this machine runs all of the service,
    else one, because the operator then starts as many as needed.
    """
    by_cores = max(1, min(num_usable_cores() // CORES_PER_PROCESS, MAX_DEFAULT_PROCESSES))
    return settings.api_processes or (by_cores if is_whole_service else 1)


def api_specs(
    settings: Settings,
    listener: socket.socket,
    table: ProcessTable,
    *,
    env: Mapping[str, str],
    stop_order: int = 0,
) -> list[ChildSpec]:
    """Args:
    env: what each process gets in addition to this one's environment.
    """
    return [
        ChildSpec(
            name=f"api-{number}",
            argv=(
                *(sys.executable, "-m", "app", "api"),
                *Inherited(number, listener.fileno(), table.fd).argv,
            ),
            env=env,
            stop_order=stop_order,
            stop_timeout_s=settings.drain_timeout_s + STOP_MARGIN_S,
            hurry_timeout_s=HURRY_TIMEOUT_S,
            pass_fds=(listener.fileno(), table.fd),
            on_death=partial(table.note_death, number),
        )
        for number in range(table.num_processes)
    ]
