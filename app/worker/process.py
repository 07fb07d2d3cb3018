"""The process of one worker: its metrics port, its signals, its engine and its exit code."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from app import event_loop
from app.logs import configure_logging
from app.metrics import WorkerMetrics
from app.settings import Settings
from app.store.client import connect
from app.supervisor import EXIT_BAD_SETTINGS, this_life
from app.tracing import Tracing, tracing_from_environment
from app.worker.witness import name_worker
from app.worker.worker import Worker
from dycoke_core.cores import num_usable_cores
from dycoke_core.errors import ModelLoadError

if TYPE_CHECKING:
    from dycoke_core.engine import Engine

logger = logging.getLogger(__name__)

CPU_RUNNING_JOBS = 4  # unless set: on a CPU each further job slows down all others

EngineFactory = Callable[[Settings], "Engine"]


def load_engine(settings: Settings) -> "Engine":
    """Loads the model onto the device. torch is imported here and not before."""
    import torch
    from transformers.utils import logging as transformers_logging

    from dycoke_core.config import EngineConfig
    from dycoke_core.engine import Engine

    transformers_logging.disable_progress_bar()  # it would go to the log
    is_on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if is_on_cpu:
        torch.set_num_threads(num_torch_threads(settings))
    return Engine.from_pretrained(
        settings.model,
        EngineConfig(
            device=settings.device,
            backend=settings.backend,
            dtype=settings.dtype,
            revision=settings.model_revision,
            max_running_sequences=settings.max_running_jobs
            or (CPU_RUNNING_JOBS if is_on_cpu else None),
            kv_cache_bytes=settings.kv_cache_bytes,
            # Workers share a CPU's memory. Each has a GPU of its own, see `app.worker.pool`.
            engines_per_device=(settings.workers or 1) if is_on_cpu else 1,
            dp_cache=settings.dp_cache,
            engines_per_host=settings.workers or 1,
            max_frame_pixels=settings.max_frame_pixels,
        ),
    )


def num_torch_threads(settings: Settings) -> int:
    """An equal share of the usable cores for each worker, unless set."""
    return settings.worker_threads or max(1, num_usable_cores() // (settings.workers or 1))


def run(settings: Settings, child: int, *, engine_factory: EngineFactory = load_engine) -> int:
    """Runs a worker until SIGTERM or SIGINT, then drains it; returns the process's exit code."""
    configure_logging(settings.log_level, f"worker-{child}")
    try:
        tracing = tracing_from_environment("worker")
    except ValueError as error:
        logger.error("%s", error)
        return EXIT_BAD_SETTINGS
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    metrics = WorkerMetrics(registry, model=settings.model_name)
    port = settings.worker_metrics_port and settings.worker_metrics_port + child
    try:
        server, _ = start_http_server(port, addr=settings.host, registry=registry)
    except OSError as error:
        logger.error(
            "cannot serve metrics on port %d (DYCOKE_WORKER_METRICS_PORT): %s", port, error.strerror
        )
        return EXIT_BAD_SETTINGS
    logger.info("serving metrics", extra={"port": server.server_port})
    try:
        return event_loop.run(_run_worker(settings, child, engine_factory, metrics, tracing))
    except ModelLoadError as error:
        logger.error("cannot load the model (DYCOKE_MODEL): %s", error.message)
        return EXIT_BAD_SETTINGS
    finally:
        server.shutdown()
        server.server_close()


async def _run_worker(
    settings: Settings,
    child: int,
    engine_factory: EngineFactory,
    metrics: WorkerMetrics,
    tracing: Tracing,
) -> int:
    assert settings.redis_url is not None
    redis = connect(settings.redis_url)
    worker = Worker(
        settings,
        redis,
        lambda: engine_factory(settings),
        metrics,
        worker_id=name_worker(child, this_life()),
        tracing=tracing,
    )
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, worker.stop)
    try:
        exit_code = 0 if await worker.run() else 1
    finally:
        await redis.aclose()
        await asyncio.to_thread(tracing.close)
    if not await asyncio.to_thread(worker.close):
        logger.warning("the engine is in a long step, or still loading: ending without it")
        logging.shutdown()
        os._exit(exit_code)
    return exit_code
