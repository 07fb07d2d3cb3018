"""Which worker processes this machine runs: one per GPU, each seeing its own; else one."""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from app.settings import API_SECRETS, Settings
from app.supervisor import ChildSpec
from app.worker.witness import Witness

# Device files without which torch finds no GPU; looking is cheaper than importing torch.
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))
COUNT_TIMEOUT_S = 120.0  # the first import of torch from a cold disk
STOP_MARGIN_S = 30.0  # for a worker's last writes, in addition to its drain

logger = logging.getLogger(__name__)


def worker_specs(
    settings: Settings, *, env: Mapping[str, str], stop_order: int = 0
) -> list[ChildSpec]:
    """Args:
    env: what each worker gets in addition to this process's environment.
    """
    gpus = visible_gpus(settings)
    num_workers = settings.workers or len(gpus) or 1
    if gpus and num_workers > len(gpus) and settings.kv_cache_bytes is None:
        logger.warning("workers share GPUs: set DYCOKE_KV_CACHE_BYTES, or the first takes most")
    redis_url = env.get("DYCOKE_REDIS_URL") or settings.redis_url
    witness = Witness(settings, redis_url) if redis_url else None
    return [
        ChildSpec(
            name=f"worker-{child}",
            argv=(sys.executable, "-m", "app", "worker", "--child", str(child)),
            env={
                **env,
                "DYCOKE_WORKERS": str(num_workers),  # they share the host's memory
                **({"CUDA_VISIBLE_DEVICES": gpus[child % len(gpus)]} if gpus else {}),
            },
            drop_env=API_SECRETS,
            stop_order=stop_order,
            stop_timeout_s=settings.drain_timeout_s + STOP_MARGIN_S,
            on_end=partial(witness.report, child) if witness else None,
        )
        for child in range(num_workers)
    ]


def visible_gpus(settings: Settings) -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls the GPUs that torch can use from here.

    A process of its own asks torch: this one stays small and without a CUDA context.
    """
    is_possible = settings.device == "auto" or settings.device.startswith("cuda")
    if not is_possible or not any(device.exists() for device in GPU_DEVICES):
        return []
    try:
        num_gpus = count_gpus()
    except (subprocess.SubprocessError, ValueError):
        logger.exception("cannot count the GPUs; starting one worker")
        return []
    chosen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return chosen[:num_gpus] or [str(gpu) for gpu in range(num_gpus)]


def count_gpus() -> int:
    count = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True,
        text=True,
        timeout=COUNT_TIMEOUT_S,
        check=True,
    )
    return int(count.stdout)
