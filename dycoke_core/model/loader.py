"""Loads a video language model from a directory in Hugging Face format, or from a hub id.

Knows which families there are; each reads its own checkpoint. Whatever is none of them, or is
quantised, is refused before a weight is read.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, PreTrainedConfig

from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.model.checkpoint import Checkpoint, check_no_pickles
from dycoke_core.model.gemma3 import Gemma3
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.qwen2_5_vl import Qwen25VL
from dycoke_core.model.qwen3_vl import Qwen3VL
from dycoke_core.model_config import check_config, is_directory

logger = logging.getLogger(__name__)

_LEAST_CAPABILITY = (8, 0)  # Ampere
_CONFIGURATION = ("config.json",)
_FILES = ("*.json", "*.jinja", "*.safetensors")

# By `model_type` in config.json. A family joins with a line here and its type in `model_config`.
_FAMILIES: Mapping[str, Callable[[Checkpoint], VideoLanguageModel]] = {
    "gemma3": Gemma3.from_checkpoint,
    "llava_onevision": LlavaOnevision.from_checkpoint,
    "qwen2_5_vl": Qwen25VL.from_checkpoint,
    "qwen3_vl": Qwen3VL.from_checkpoint,
}


def load_model(
    path: str | Path, *, device: str = "auto", dtype: str = "auto", revision: str | None = None
) -> VideoLanguageModel:
    """Loads a model, its tokenizer, its chat template and its processor's settings.

    Args:
        path: a directory, or a hub id, which is downloaded where the hub can be reached.
        device: "auto" takes a CUDA device if there is one.
        dtype: "auto" takes the checkpoint's own; float16 becomes float32 on a CPU.
        revision: of the hub's repository; a commit's hash, or what may change: a tag, a branch.
            None: what the repository's main branch is now.

    Raises:
        ModelLoadError: a model that is not supported, or an incomplete checkpoint.
    """
    resolved_device = _resolve_device(device)
    # Before 145 GB are fetched for nothing.
    family = _FAMILIES[check_config(_resolve(path, _CONFIGURATION, revision))]
    directory = _resolve(path, _FILES, revision)
    check_no_pickles(directory)
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            "transformers cannot use the config.json of the model directory: fetch it again"
        ) from error
    resolved_dtype = _resolve_dtype(dtype, config, resolved_device)
    _check_kernels(resolved_device, resolved_dtype)
    return family(Checkpoint(directory, config, resolved_device, resolved_dtype))


def _resolve(path: str | Path, files: Sequence[str], revision: str | None) -> Path:
    """The directory; of a hub's repository, a copy of these files."""
    if is_directory(path):
        if revision is not None:
            raise ModelLoadError("a directory has no revision: leave it out, or name a hub id")
        return Path(path)
    if os.sep in str(path).strip(os.sep).replace(os.sep, "", 1) or str(path).startswith((".", "/")):
        raise ModelLoadError(
            "the model directory does not exist: name one, or a hub id such as owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        copy = Path(snapshot_download(str(path), revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(
            "the model is not a directory, and cannot be fetched from a hub: check its name, its "
            "revision and the connection"
        ) from error
    if revision is None:
        logger.warning("the model is not pinned: its revision is %s now", copy.name)
    return copy


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ModelLoadError(
            f"unknown device '{device}': write auto, cpu, cuda or cuda:N"
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(
            f"no CUDA device can be used here: set device to 'cpu' or 'auto', not '{device}'"
        )
    return resolved


def _resolve_dtype(dtype: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    stored = config.dtype or config.text_config.dtype or torch.float32
    if stored == torch.float16 and device.type == "cpu":
        return torch.float32
    return cast(torch.dtype, stored)


def _check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Fused attention in half precision needs Ampere or newer; float32 runs anywhere."""
    if device.type == "cuda" and dtype != torch.float32:
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            raise ModelLoadError(
                f"this GPU (compute capability {capability[0]}.{capability[1]}) has no fused "
                "attention for half precision: set the dtype to float32"
            )
