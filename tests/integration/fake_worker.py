"""A worker process with a fake engine.

python -m tests.integration.fake_worker CHILD [IMAGE_SIZE]
"""

import sys

from app.settings import load_settings
from app.worker.process import CPU_RUNNING_JOBS, run
from tests.integration.fake_engine import FakeEngine

if __name__ == "__main__":
    child, *sizes = map(int, sys.argv[1:])
    frames = {"image_size": sizes[0]} if sizes else {}
    sys.exit(
        run(
            load_settings(),
            child,
            engine_factory=lambda settings: FakeEngine(
                settings.max_running_jobs or CPU_RUNNING_JOBS, **frames
            ),
        )
    )
