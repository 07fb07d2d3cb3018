"""A checkpoint in Hugging Face format on disk: what every family of models reads from it alike.

Takes the layout that transformers writes today and that of the hub's older repositories (their key
names, chat_template.json, preprocessor_config.json). A checkpoint with a missing or misshapen
tensor is refused, never filled up with random weights.
"""

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
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
from dycoke_core.model.layer_attention import ATTENTION_NAME
from dycoke_core.model.packing import can_pack, pack_weights
from dycoke_core.model_config import read_json

logger = logging.getLogger(__name__)

_DIGEST_THREADS = 8
# Whatever transformers may read of a directory as long as it may not run code from it.
_READ = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*/*.jinja")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

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
            raise ModelLoadError(
                "the model directory has no tokenizer.json: fetch the whole repository"
            )
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
            raise ModelLoadError(
                "the model directory has no chat template: it must have a chat_template.jinja, a "
                "chat_template.json, or one in tokenizer_config.json"
            )
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
                "neither generation_config.json nor tokenizer_config.json names an eos token"
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
                use_safetensors=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelLoadError(
                "the model directory has no complete set of weights: it must have all safetensors "
                "files of the repository"
            ) from error
        faults = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
        if faults:
            raise ModelLoadError(
                f"the checkpoint lacks {len(faults)} tensors that config.json asks for, first "
                f"'{faults[0]}': fetch the whole repository"
            )
        if info["unexpected_keys"]:
            logger.warning("checkpoint has %d tensors of no use", len(info["unexpected_keys"]))
        model = cast(Model, model.to(self.device).eval())
        if can_pack(self.device, self.dtype):
            pack_weights(model)
        return model


def weights_digest(directory: Path) -> str:
    """Identifies a checkpoint: changes with every byte of every file that loading may read.

    Reads all of them, several at a time, at one to two GB/s for each: a fraction of what loading
    the weights takes, which then come from the page cache.
    """
    files = sorted({file for pattern in _READ for file in directory.glob(pattern)})
    with ThreadPoolExecutor(_DIGEST_THREADS) as threads:
        digests = list(threads.map(_file_digest, files))
    digest = hashlib.sha256()
    for file, content in zip(files, digests, strict=True):
        digest.update(f"{file.relative_to(directory)}\0{content}\n".encode())
    return digest.hexdigest()[:32]


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_no_pickles(directory: Path) -> None:
    """Refuses weights that run code when they are loaded, even where safetensors lie next to them.

    Raises:
        ModelLoadError: names one of the files.
    """
    found = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if found:
        raise ModelLoadError(
            f"the model directory has {found[0]}: pickled weights can run code when they are "
            "loaded, so only safetensors are; remove it, or convert it to safetensors first"
        )
