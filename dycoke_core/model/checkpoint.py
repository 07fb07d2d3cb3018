"""A checkpoint in Hugging Face format on disk: what every family of models reads from it alike.

Takes the layout that transformers writes today and that of the hub's older repositories (their key
names, chat_template.json, preprocessor_config.json). A checkpoint with a missing or misshapen
tensor is refused, never filled up with random weights.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dycoke_core.errors import ModelLoadError
from dycoke_core.model.attention import ATTENTION_NAME
from dycoke_core.model.packing import can_pack, pack_weights

logger = logging.getLogger(__name__)

_DIGEST_BLOCKS = 64
_DIGEST_BLOCK_BYTES = 2**16

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A directory, and where its weights are to go. Parts are read when they are asked for.

    Raises:
        ModelLoadError: by each part, where it is missing or cannot be read.
    """

    directory: Path
    config: PreTrainedConfig
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        if not (self.directory / "tokenizer.json").is_file():
            raise ModelLoadError("the model directory has no tokenizer.json")
        return cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(self.directory))

    @cached_property
    def chat_template(self) -> str:
        """The processor's template comes before the tokenizer's, which may know no video."""
        jinja = self.directory / "chat_template.jinja"
        if jinja.is_file():
            return jinja.read_text()
        template = read_json(self.directory / "chat_template.json").get("chat_template")
        template = template or self.tokenizer.chat_template
        if not isinstance(template, str):
            raise ModelLoadError("the model directory has no chat template")
        return template

    @cached_property
    def video_processor(self) -> dict[str, Any]:
        """Settings of the video processor, or of the image processor, which are the same."""
        processor = read_json(self.directory / "processor_config.json")
        settings = (
            processor.get("video_processor")
            or read_json(self.directory / "video_preprocessor_config.json")
            or processor.get("image_processor")
            or read_json(self.directory / "preprocessor_config.json")
        )
        return cast(dict[str, Any], settings)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        eos: int | list[int] | None = None
        if (self.directory / "generation_config.json").is_file():
            eos = GenerationConfig.from_pretrained(self.directory).eos_token_id
        if eos is None:
            eos = cast(int | None, self.tokenizer.eos_token_id)
        if eos is None:
            raise ModelLoadError(
                "neither generation_config.json nor the tokenizer names an end token"
            )
        return frozenset([eos] if isinstance(eos, int) else eos)

    @cached_property
    def weights_digest(self) -> str:
        return weights_digest(self.directory)

    def load_weights(self, model_class: type[Model]) -> Model:
        """The model on its device, its text layers set up for the engine's attention."""
        try:
            model, info = model_class.from_pretrained(
                self.directory,
                dtype=self.dtype,
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
        model = cast(Model, model.to(self.device).eval())
        if can_pack(self.device, self.dtype):
            pack_weights(model)
        return model


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


def read_json(file: Path) -> dict[str, Any]:
    """An object; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ModelLoadError(f"{file.name} is not valid JSON") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{file.name} is not a JSON object")
    return content
