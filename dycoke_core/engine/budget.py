"""How many bytes of keys and values an engine may hold, decided once at start."""

import os

import torch

from dycoke_core.config import EngineConfig
from dycoke_core.model.llava_onevision import LlavaOnevision

_GPU_SHARE = 0.85  # of what is free once the weights are loaded; the rest is for activations
_CPU_SHARE = 0.25  # of what is available: other processes live here too
_CPU_MAX_BYTES = 8 * 2**30


def kv_budget_bytes(model: LlavaOnevision, config: EngineConfig) -> int:
    """The setting, else a share of the device's free memory now that the model is loaded."""
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if model.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(model.device)
        return int(free_bytes * _GPU_SHARE / config.engines_per_device)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(int(available * _CPU_SHARE), _CPU_MAX_BYTES) // config.engines_per_device
