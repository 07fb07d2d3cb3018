"""The metrics of an API after clients have come and gone."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.store.keys import RedisKeys
from tests.integration.api import (
    RunningApi,
    ScriptedWorker,
    num_workers,
    running_api,
    until,
)
from tests.integration.conftest import RedisServer


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    async with running_api(
        redis_server.url, keys, tmp_path, max_queued_jobs=1, max_streams=3
    ) as api:
        yield api


async def test_metrics_say_what_clients_experienced(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    post = asyncio.create_task(api.post())
    delivery = await worker.answer(3)
    await post
    await api.client.get(f"/v1/jobs/{delivery.job_id}/events", headers={"Last-Event-ID": "1-0"})
    await api.post(num_frames=0)
    await until(lambda: num_workers(api) == 1.0)
    text = await api.metrics()
    labels = 'model="tiny",policy="dycoke",requested="fixed"'
    requests = 'model="tiny",outcome="{}",policy="dycoke",requested="fixed"'
    for line in (
        f"dycoke_request_latency_seconds_count{{{labels}}} 1.0",
        f"dycoke_time_to_first_token_seconds_count{{{labels}}} 1.0",
        f"dycoke_inter_token_latency_seconds_count{{{labels}}} 2.0",
        f'dycoke_retained_token_ratio_sum{{{labels},stage="prefill"}} 0.5',
        f'dycoke_retained_token_ratio_sum{{{labels},stage="decode"}} 0.25',
        f"dycoke_request_kv_bytes_sum{{{labels}}} 1000.0",
        f"dycoke_request_kv_bytes_full_tokens_sum{{{labels}}} 2000.0",
        f"dycoke_request_peak_memory_bytes_sum{{{labels}}} 1e+08",
        f"dycoke_requests_total{{{requests.format('done')}}} 1.0",
        f"dycoke_requests_total{{{requests.format('engine_error')}}} 0.0",
        'dycoke_rejections_total{reason="invalid_request"} 1.0',
        'dycoke_rejections_total{reason="queue_full"} 0.0',
        "dycoke_store_up 1.0",
        "dycoke_queue_capacity 1.0",
        "dycoke_stream_capacity 3.0",
        'dycoke_reader_kills_total{reason="timeout"} 0.0',
        "dycoke_reader_exceptions_total 0.0",
        "dycoke_stream_resumes_total 1.0",
        "dycoke_client_disconnects_total 0.0",
        'dycoke_queue_oldest_age_seconds{model="tiny"} 0.0',
        'dycoke_queue_depth{model="tiny"} 0.0',
        'dycoke_queue_places{model="tiny"} 0.0',
        'dycoke_workers_alive{model="tiny"} 1.0',
        "dycoke_reader_jobs 0.0",
        "dycoke_open_streams 0.0",
    ):
        assert line in text, line
    assert delivery.job_id not in text
    lag_samples = api.api.metrics.registry.get_sample_value("dycoke_event_loop_lag_seconds_count")
    assert lag_samples is not None and lag_samples > 0
