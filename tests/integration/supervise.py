"""A supervisor in a process of its own: `python -m tests.integration.supervise NAME=COMMAND ...`.

Children stop in the order in which they are named.
"""

import asyncio
import shlex
import sys

from app.logs import configure_logging
from app.supervisor import ChildSpec, RestartPolicy, Supervisor

if __name__ == "__main__":
    configure_logging("INFO", "supervisor")
    specs = [
        ChildSpec(name, tuple(shlex.split(command)), stop_order=order)
        for order, (name, command) in enumerate(word.split("=", 1) for word in sys.argv[1:])
    ]
    restarts = RestartPolicy(first_wait_s=0.05, max_wait_s=0.2)
    sys.exit(asyncio.run(Supervisor(specs, restarts=restarts).run()))
