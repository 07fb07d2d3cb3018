"""A worker process with a fake engine for frames that decord can scale: `python -m
tests.chaos.worker CHILD`.
"""

import sys

from app.settings import load_settings
from app.worker.process import CPU_RUNNING_JOBS, run
from tests.integration.fake_engine import FakeEngine

IMAGE_SIZE = 32

if __name__ == "__main__":
    settings = load_settings()
    num_jobs = settings.max_running_jobs or CPU_RUNNING_JOBS
    engine = FakeEngine(num_jobs, image_size=IMAGE_SIZE)
    sys.exit(run(settings, int(sys.argv[1]), engine_factory=lambda _: engine))
