"""A Qwen checkpoint and a sequence in transformers, put together without our adapter.

The processors need torchvision, which may be missing: ids and patches are made here by plain loops
from what the processors document.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from dycoke_core.sequence import Sequence
from tests.random_qwen import VIDEO_PAD, VISION_END, VISION_START

MERGE, TEMPORAL = 2, 2


class QwenReference:
    """Qwen2.5-VL."""

    def __init__(self, directory: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.patch = self.model.config.vision_config.patch_size
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        template = json.loads((directory / "chat_template.json").read_text())
        self.chat_template = template["chat_template"]
        (file,) = directory.glob("*preprocessor_config.json")
        settings = json.loads(file.read_text())
        self.mean, self.std = settings["image_mean"], settings["image_std"]

    @cached_property
    def video_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(VIDEO_PAD))

    def inputs(self, sequence: Sequence) -> dict[str, Tensor]:
        """As the processor hands them to the model."""
        frames = with_whole_units(sequence.frames)
        height, width = frames.shape[1:3]
        grid = (len(frames) // TEMPORAL, height // self.patch, width // self.patch)
        text = self.expanded(self.rendered(sequence), sequence, grid)
        ids = torch.tensor([self.tokenizer(text)["input_ids"]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": 2 * (ids == self.video_token_id).long(),
            "pixel_values_videos": patchify(frames, self.mean, self.std, self.patch),
            "video_grid_thw": torch.tensor([grid]),
            **self.times(sequence),
        }

    def times(self, sequence: Sequence) -> dict[str, Tensor]:
        return {"second_per_grid_ts": torch.tensor([seconds_per_unit(sequence)])}

    def expanded(self, text: str, sequence: Sequence, grid: tuple[int, int, int]) -> str:
        num_visual = grid[0] * grid[1] * grid[2] // MERGE**2
        return text.replace(VIDEO_PAD, VIDEO_PAD * num_visual)

    def rendered(self, sequence: Sequence) -> str:
        content = [{"type": "video"}, {"type": "text", "text": sequence.messages[-1].content}]
        turns: list[dict[str, Any]] = [
            {"role": message.role, "content": message.content} for message in sequence.messages
        ]
        turns[-1]["content"] = content
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
        )
        return str(text)

    def positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """int64 [3, P]."""
        unneeded = ("attention_mask", "pixel_values_videos")
        needed = {name: value for name, value in inputs.items() if name not in unneeded}
        positions, _ = self.model.model.get_rope_index(**needed)
        return positions[:, 0]  # type: ignore[no-any-return]

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """[units, N, features]."""
        grid = inputs["video_grid_thw"]
        output = self.model.model.get_video_features(inputs["pixel_values_videos"], grid)
        extra = [parts[0] for parts in getattr(output, "deepstack_features", [])]
        features = torch.cat([output.pooler_output[0], *extra], dim=1)
        return features.view(int(grid[0, 0]), -1, features.shape[1])  # type: ignore[no-any-return]

    def compressed(
        self, inputs: dict[str, Tensor], select: Callable[[Tensor], list[int]]
    ) -> "CompressedPrompt":
        """A prompt without the tokens that stage I drops."""
        features, ids = self.features(inputs), inputs["input_ids"][0]
        embeds = self.model.get_input_embeddings()(ids)
        size = embeds.shape[1]
        kept = set(select(features[..., :size]))
        rows = features.flatten(0, 1)
        visual_places = (ids == self.video_token_id).nonzero().flatten().tolist()
        embeds[visual_places] = rows[:, :size]
        adds = torch.zeros(rows.shape[1] // size - 1, len(ids), size)
        for layer in range(len(adds)):
            adds[layer, visual_places] = rows[:, size * (layer + 1) : size * (layer + 2)]
        dropped = {place for n, place in enumerate(visual_places) if n not in kept}
        stays = [place for place in range(len(ids)) if place not in dropped]
        visual = [n for n, place in enumerate(stays) if int(ids[place]) == self.video_token_id]
        positions = self.positions(inputs)[:, stays]
        layer_adds = adds[:, stays] if len(adds) else None
        return CompressedPrompt(embeds[stays], positions, layer_adds, visual)


@dataclass(frozen=True)
class CompressedPrompt:
    embeds: Tensor  # [P, D]
    positions: Tensor  # int64 [3, P]
    layer_adds: Tensor | None  # [layers, P, D]
    visual: list[int]  # where the visual tokens are in it


class Qwen3Reference(QwenReference):
    """Qwen3-VL. Its processor expands the text without looking at a frame."""

    def times(self, sequence: Sequence) -> dict[str, Tensor]:
        return {}

    def expanded(self, text: str, sequence: Sequence, grid: tuple[int, int, int]) -> str:
        processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
        processor.image_token = None
        processor.video_token = VIDEO_PAD
        processor.video_token_id = self.video_token_id
        processor.vision_start_token, processor.vision_end_token = VISION_START, VISION_END
        processor.video_processor = SimpleNamespace(merge_size=MERGE, temporal_patch_size=TEMPORAL)
        video = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata(sequence)]}
        replacement = processor.replace_video_token(video, 0)
        (expanded,), _ = processor.get_text_with_replacements(
            [text], videos_replacements=[replacement]
        )
        return str(expanded)


def metadata(sequence: Sequence) -> VideoMetadata:
    """As of a video of ten frames for each one taken."""
    num_frames = len(sequence.frames)
    if sequence.timing is None:
        return VideoMetadata(num_frames, fps=24.0, frames_indices=list(range(num_frames)))
    assert sequence.timing.duration_s is not None
    fps = 10 * num_frames / sequence.timing.duration_s
    indices = list(range(0, 10 * num_frames, 10))
    return VideoMetadata(10 * num_frames, fps=fps, frames_indices=indices)


def with_whole_units(frames: np.ndarray) -> np.ndarray:
    missing = -len(frames) % TEMPORAL
    return np.concatenate([frames, *([frames[-1:]] * missing)])


def seconds_per_unit(sequence: Sequence) -> float:
    """The rule for a video whose metadata says how long it is, and for one without."""
    timing = sequence.timing
    if timing is None:
        return TEMPORAL / 24
    assert timing.duration_s is not None
    return TEMPORAL / (len(sequence.frames) / timing.duration_s)


def patchify(frames: np.ndarray, mean: list[float], std: list[float], size: int) -> Tensor:
    """Patch by patch, value by value, in the order in which the processor's blocks lie."""
    pixels = (torch.from_numpy(frames.copy()).float() / 255 - torch.tensor(mean)) / torch.tensor(
        std
    )
    num_frames, height, width, _ = pixels.shape
    side = size * MERGE
    patches = []
    for first in range(0, num_frames, TEMPORAL):
        for top in range(0, height, side):
            for left in range(0, width, side):
                for y in range(top, top + side, size):
                    for x in range(left, left + side, size):
                        patch = pixels[first : first + TEMPORAL, y : y + size, x : x + size]
                        patches.append(patch.permute(3, 0, 1, 2).flatten())
    return torch.stack(patches)
