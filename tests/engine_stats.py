"""An engine's statistics, for tests that need no engine."""

from dataclasses import replace

from dycoke_core.engine_card import EngineStats

IDLE = EngineStats(
    num_waiting=0,
    num_running=0,
    kv_bytes_in_use=0,
    kv_bytes_cached=0,
    kv_bytes_budget=1,
    device_memory_bytes=0,
)
ONE_RUNNING = replace(IDLE, num_running=1)
