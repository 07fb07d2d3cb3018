"""A pool of workers with fake engines: what `python -m app worker` runs, with another engine, and
restarts quick enough for a run of minutes.
"""

import asyncio
import sys
from dataclasses import replace

from app.logs import configure_logging
from app.settings import load_settings
from app.supervisor import RestartPolicy, Supervisor
from app.worker.pool import worker_specs

RESTARTS = RestartPolicy(first_wait_s=0.05, max_wait_s=0.5, stable_after_s=5.0)

if __name__ == "__main__":
    configure_logging("INFO", "supervisor")
    settings = load_settings()
    specs = [
        replace(spec, argv=(sys.executable, "-m", "tests.chaos.worker", str(child)))
        for child, spec in enumerate(worker_specs(settings, env={}))
    ]
    sys.exit(asyncio.run(Supervisor(specs, restarts=RESTARTS).run()))
