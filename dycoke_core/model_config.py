"""Checks by its config.json whether a model can be served. Standard library only, so that a service
can refuse a model before it starts anything.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dycoke_core.errors import ModelLoadError

# By `model_type`; `dycoke_core.model.loader` has an adapter for each.
SUPPORTED_TYPES = ("gemma3", "llava_onevision", "qwen2_5_vl", "qwen3_vl")


def check_config(directory: Path) -> str:
    """Returns the model's type.

    Raises:
        ModelLoadError: no adapter knows it, or it is quantised.
    """
    settings = read_json(directory / "config.json")
    if not settings:
        raise ModelLoadError(
            "the model directory has no config.json, or an empty one: fetch the whole repository"
        )
    model_type = str(settings.get("model_type"))
    if model_type not in SUPPORTED_TYPES:
        raise ModelLoadError(
            f"model type '{model_type}' is not supported{_architecture(settings)}; "
            f"supported are: {', '.join(SUPPORTED_TYPES)}"
        )
    _check_not_quantized(settings)
    return model_type


def is_directory(path: str | Path) -> bool:
    """Whether a model is one; else it is a hub's. Raises: ModelLoadError."""
    try:
        return Path(path).is_dir()
    except OSError as error:
        raise ModelLoadError(f"the model directory cannot be read: {error.strerror}") from error


def read_json(file: Path) -> dict[str, Any]:
    """An object; empty where there is no such file. Raises: ModelLoadError."""
    try:
        if not file.is_file():
            return {}
        content = json.loads(file.read_text())
    except OSError as error:
        raise ModelLoadError(f"{file.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelLoadError(f"{file.name} is not valid JSON") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{file.name} is not a JSON object")
    return content


def _architecture(settings: Mapping[str, Any]) -> str:
    architectures = settings.get("architectures")
    return f" (architecture {architectures[0]})" if architectures else ""


def _check_not_quantized(settings: Mapping[str, Any]) -> None:
    """Of a quantised checkpoint the layers are of other classes, which no backend here runs."""
    parts = (settings, settings.get("text_config") or {}, settings.get("vision_config") or {})
    for part in parts:
        quantization = part.get("quantization_config") or part.get("compression_config")
        if quantization:
            method = quantization.get("quant_method", "an unknown method")
            raise ModelLoadError(
                f"the checkpoint is quantised ({method}){_architecture(settings)}; only weights in "
                "float32, bfloat16 or float16 can be loaded: take the unquantised repository, of "
                f"one of the supported types: {', '.join(SUPPORTED_TYPES)}"
            )
