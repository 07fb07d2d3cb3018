"""The one family that the laboratory and the benchmarks know: their baselines reach inside it."""

from pathlib import Path

from dycoke_core.errors import ModelLoadError
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model


def load_llava_onevision(
    path: str | Path, *, device: str = "auto", dtype: str = "auto"
) -> LlavaOnevision:
    """Raises ModelLoadError: `load_model` refused it, or it is a model of another family."""
    model = load_model(path, device=device, dtype=dtype)
    if not isinstance(model, LlavaOnevision):
        raise ModelLoadError(f"this needs a LLaVA-OneVision, not a {model.architecture}")
    return model
