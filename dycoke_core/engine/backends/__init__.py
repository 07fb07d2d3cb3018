"""Backends, which do the engine's work: one package for each kind of device."""

import torch

from dycoke_core.config import BackendName, Batching, EngineConfig
from dycoke_core.engine.backend import Backend
from dycoke_core.engine.backends.cpu.backend import CpuBackend
from dycoke_core.engine.sight import window_of
from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import VideoLanguageModel


def backend_name(config: EngineConfig, device: torch.device) -> BackendName:
    """The backend for a device.

    Raises:
        ModelLoadError: the setting names one that does not run there.
    """
    if config.backend == "auto":
        return "cuda" if device.type == "cuda" else "cpu"
    if config.backend == "cpu" and device.type != "cpu":
        raise ModelLoadError(
            f"backend 'cpu' cannot run on device '{device.type}': set backend to 'cuda' or 'auto', "
            "or device to 'cpu'"
        )
    return config.backend


def make_backend(
    name: BackendName, model: VideoLanguageModel, config: EngineConfig, batching: Batching
) -> Backend:
    """Raises ModelLoadError: the backend's packages are missing, or the model does not fit it."""
    _check_layers(model)
    if name == "cpu":
        return CpuBackend(model, config)
    # Imported only where it is asked for: it needs Triton.
    from dycoke_core.engine.backends.cuda.backend import CudaBackend

    return CudaBackend(model, config, batching)


def _check_layers(model: VideoLanguageModel) -> None:
    """Both caches give every layer the same rows, and know one window."""
    window_of(model.layers)
    sizes = {(layer.num_kv_heads, layer.head_size) for layer in model.layers}
    if len(sizes) > 1:
        raise ModelLoadError(
            "the model has layers whose keys differ in size, which no backend runs"
        )
