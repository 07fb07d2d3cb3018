"""Loads a LLaVA-OneVision checkpoint in Hugging Face format: a directory or a hub id.

Takes the layout that transformers writes today and that of the llava-hf repositories of 2024 (their
key names, chat_template.json, preprocessor_config.json). A checkpoint with a missing or misshapen
tensor is refused, never filled up with random weights.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from dycoke_core.errors import ModelLoadError
from dycoke_core.model.attention import ATTENTION_NAME
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.packing import can_pack, pack_weights
from dycoke_core.preprocess import FrameNormalizer, PromptEncoder

logger = logging.getLogger(__name__)

_DIGEST_BLOCKS = 64
_DIGEST_BLOCK_BYTES = 2**16
_LEAST_CAPABILITY = (8, 0)  # Ampere


def load_model(path: str | Path, *, device: str = "auto", dtype: str = "auto") -> LlavaOnevision:
    """Loads a model, its tokenizer, its chat template and its processor's settings.

    Args:
        path: a directory, or a hub id, which is downloaded where the hub can be reached.
        device: "auto" takes a CUDA device if there is one.
        dtype: "auto" takes the checkpoint's own; float16 becomes float32 on a CPU.

    Raises:
        ModelLoadError: not a LLaVA-OneVision checkpoint, or an incomplete one.
    """
    directory = _resolve(path)
    resolved_device = _resolve_device(device)
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ModelLoadError("the model directory has no readable config.json") from error
    if not isinstance(config, LlavaOnevisionConfig):
        raise ModelLoadError(f"model type '{config.model_type}' is not supported")
    if config.vision_feature_select_strategy != "full":
        raise ModelLoadError("only vision_feature_select_strategy 'full' is supported")
    resolved_dtype = _resolve_dtype(dtype, config, device)
    _check_kernels(resolved_device, resolved_dtype)
    tokenizer = _load_tokenizer(directory)
    return LlavaOnevision(
        model=_load_weights(directory, resolved_device, resolved_dtype),
        prompt_encoder=PromptEncoder(
            tokenizer,
            chat_template=_chat_template(directory, tokenizer),
            video_token_id=config.video_token_id,
        ),
        normalizer=_frame_normalizer(directory),
        eos_token_ids=_eos_token_ids(directory, tokenizer),
        weights_digest=weights_digest(directory),
    )


def weights_digest(directory: Path) -> str:
    """Identifies a checkpoint: sha256 over configuration, tokenizer, and samples of the weights.

    Reads every file's size and up to 64 evenly spaced blocks of 64 KiB, so that 145 GB take no
    longer than 4 MB a file. An identity for caches and receipts, no proof of integrity.
    """
    digest = hashlib.sha256()
    names = (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    )
    small = [directory / name for name in names]
    for file in [*small, *sorted(directory.glob("*.safetensors"))]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            for block in range(min(_DIGEST_BLOCKS, size // _DIGEST_BLOCK_BYTES + 1)):
                stream.seek(block * max(size // _DIGEST_BLOCKS, _DIGEST_BLOCK_BYTES))
                digest.update(stream.read(_DIGEST_BLOCK_BYTES))
    return digest.hexdigest()[:32]


def _resolve(path: str | Path) -> Path:
    if Path(path).is_dir():
        return Path(path)
    if os.sep in str(path).strip(os.sep).replace(os.sep, "", 1) or str(path).startswith((".", "/")):
        raise ModelLoadError("the model directory does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["*.json", "*.jinja", "*.safetensors"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(
            "the model is no directory and cannot be fetched from a hub"
        ) from error


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ModelLoadError(f"unknown device '{device}'") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError("no CUDA device can be used here")
    return resolved


def _resolve_dtype(dtype: str, config: LlavaOnevisionConfig, device: str) -> torch.dtype:
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    stored = config.dtype or config.text_config.dtype or torch.float32
    if stored == torch.float16 and _resolve_device(device).type == "cpu":
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


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    if not (directory / "tokenizer.json").is_file():
        raise ModelLoadError("the model directory has no tokenizer.json")
    return cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(directory))


def _load_weights(
    directory: Path, device: torch.device, dtype: torch.dtype
) -> LlavaOnevisionForConditionalGeneration:
    try:
        model, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation={"text_config": ATTENTION_NAME, "vision_config": "sdpa"},
            output_loading_info=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError("the model directory has no complete set of weights") from error
    faults = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if faults:
        raise ModelLoadError(f"the checkpoint lacks {len(faults)} tensors, first '{faults[0]}'")
    if info["unexpected_keys"]:
        logger.warning("checkpoint has %d tensors of no use", len(info["unexpected_keys"]))
    model = cast(LlavaOnevisionForConditionalGeneration, model.to(device).eval())
    if can_pack(device, dtype):
        pack_weights(model)
    return model


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return cast(dict[str, Any], json.loads(file.read_text()))
    except ValueError as error:
        raise ModelLoadError(f"{file.name} is not valid JSON") from error


def _chat_template(directory: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """The processor's template comes before the tokenizer's, which may know no video."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text()
    template = _read_json(directory / "chat_template.json").get("chat_template")
    template = template or tokenizer.chat_template
    if not isinstance(template, str):
        raise ModelLoadError("the model directory has no chat template")
    return template


def _frame_normalizer(directory: Path) -> FrameNormalizer:
    """Settings of the video processor, or of the image processor, which are the same numbers."""
    processor = _read_json(directory / "processor_config.json")
    settings = (
        processor.get("video_processor")
        or _read_json(directory / "video_preprocessor_config.json")
        or processor.get("image_processor")
        or _read_json(directory / "preprocessor_config.json")
    )
    half = [0.5, 0.5, 0.5]
    return FrameNormalizer(
        mean=tuple(settings.get("image_mean") or half),
        std=tuple(settings.get("image_std") or half),
        rescale_factor=float(settings.get("rescale_factor") or 1 / 255),
    )


def _eos_token_ids(directory: Path, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    eos: int | list[int] | None = None
    if (directory / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(directory).eos_token_id
    if eos is None:
        eos = cast(int | None, tokenizer.eos_token_id)
    if eos is None:
        raise ModelLoadError("neither generation_config.json nor the tokenizer names an end token")
    return frozenset([eos] if isinstance(eos, int) else eos)
