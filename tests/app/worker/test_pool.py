"""Which workers a machine runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from app.embedded_redis import EmbeddedRedis
from app.settings import Settings
from app.worker import pool, process
from app.worker.process import num_torch_threads


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine on which torch finds three GPUs."""
    monkeypatch.setattr(pool, "GPU_DEVICES", (tmp_path,))
    monkeypatch.setattr(pool, "count_gpus", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def pins(settings: Settings) -> list[str | None]:
    specs = pool.worker_specs(settings, env={})
    return [spec.env.get("CUDA_VISIBLE_DEVICES") for spec in specs]


def test_one_worker_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "GPU_DEVICES", ())
    (spec,) = pool.worker_specs(Settings(), env={"DYCOKE_REDIS_URL": "redis://r"}, stop_order=1)
    assert spec.argv == (sys.executable, "-m", "app", "worker", "--child", "0")
    assert spec.env == {"DYCOKE_REDIS_URL": "redis://r", "DYCOKE_WORKERS": "1"}
    assert spec.stop_order == 1
    assert spec.stop_timeout_s > Settings().drain_timeout_s


def test_keys_of_the_api_are_kept_from_workers_and_redis(tmp_path: Path) -> None:
    (worker,) = pool.worker_specs(Settings(device="cpu"), env={})
    embedded = EmbeddedRedis(tmp_path, max_frame_store_bytes=1)
    for spec in (worker, embedded.child_spec(stop_order=0)):
        assert "DYCOKE_API_KEYS" in spec.drop_env
    embedded.close()


def test_one_worker_per_gpu_each_with_its_own(gpus: pytest.MonkeyPatch) -> None:
    assert pins(Settings()) == ["0", "1", "2"]


def test_workers_share_the_gpus_in_turn(gpus: pytest.MonkeyPatch) -> None:
    assert pins(Settings(workers=5)) == ["0", "1", "2", "0", "1"]
    assert pins(Settings(workers=1)) == ["0"]


def test_visible_gpus_keep_their_names(gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,7")
    assert pins(Settings()) == ["GPU-a", "GPU-b", "7"]


def test_gpus_are_left_alone_when_the_device_is_the_cpu(gpus: pytest.MonkeyPatch) -> None:
    assert pins(Settings(device="cpu", workers=2)) == [None, None]


def test_failing_count_leaves_one_worker(
    gpus: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> int:
        raise subprocess.TimeoutExpired("torch", 1)

    gpus.setattr(pool, "count_gpus", fail)
    assert pins(Settings()) == [None]
    assert "cannot count the GPUs; starting one worker" in caplog.messages


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "num_usable_cores", lambda: 8)
    assert num_torch_threads(Settings()) == 8
    assert num_torch_threads(Settings(workers=3)) == 2
    assert num_torch_threads(Settings(workers=20)) == 1
    assert num_torch_threads(Settings(workers=3, worker_threads=5)) == 5
