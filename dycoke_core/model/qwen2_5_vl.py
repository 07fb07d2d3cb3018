"""Qwen2.5-VL: one run of visual tokens, whose positions carry the time; windows in the tower."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from dycoke_core.compression.flops import VisionGeometry
from dycoke_core.model.adapter import Clip, PromptLayout, Text, Units
from dycoke_core.model.qwen_vl import QwenVL
from dycoke_core.model_frames import Spread
from dycoke_core.transfer import to_device


@dataclass(slots=True, eq=False)
class Qwen25VL(QwenVL):
    model_class: ClassVar[type[PreTrainedModel]] = Qwen2_5_VLForConditionalGeneration
    frame_spread: ClassVar[Spread] = "starts"
    limits_whole_video: ClassVar[bool] = False
    takes_whole_units: ClassVar[bool] = True
    processor_defaults: ClassVar[dict[str, Any]] = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
    }

    def vision_geometry(self, height: int, width: int) -> VisionGeometry:
        config, patches = self.model.config.vision_config, self.patches
        rows, columns = patches.grid(height, width)
        merged_size = config.hidden_size * patches.merge**2
        num_full = len(config.fullatt_block_indexes)
        in_window = _patches_in_window(config, rows, columns)
        attended = num_full * rows * columns + (config.depth - num_full) * in_window
        return VisionGeometry(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_mlp_matrices=3,
            num_layers=config.depth,
            num_patches=rows * columns,
            num_attended=attended / config.depth,
            patch_inputs=config.in_channels * patches.temporal * patches.patch**2,
            projector_products=merged_size
            * (merged_size + config.out_hidden_size)
            / patches.merge**2,
            projector_values=4 * config.hidden_size + 2 * config.out_hidden_size / patches.merge**2,
            is_rotary=True,
        )

    def _lay_out(self, rendered: str, clip: Clip) -> PromptLayout:
        before, question = self.prompt_encoder.split(rendered)
        num_units = self.patches.num_units(clip.num_frames)
        return PromptLayout(
            clip,
            (Text(before), Units(range(num_units))),
            question,
            num_units=num_units,
            tokens_per_unit=self.tokens_per_unit(clip.height, clip.width),
        )

    def _encode(self, patches: Tensor, grid: tuple[int, int, int]) -> Iterator[Tensor | None]:
        return _encode(self.model.model.visual, patches, grid)


def _encode(tower: Any, patches: Tensor, grid: tuple[int, int, int]) -> Iterator[Tensor | None]:
    """Units attend to themselves, in whole or, in most layers, in windows.

    Source: `Qwen2_5_VisionTransformerPretrainedModel.forward`, which it equals (tested).
    """
    sizes = torch.tensor([grid])  # on the host, as are the lengths by which attention is split
    merge = tower.spatial_merge_size
    order, window_lengths = get_vision_window_index(
        sizes, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size
    )
    order = to_device(order, patches.device)
    whole_lengths = get_vision_cu_seqlens(sizes)

    def by_window(rows: Tensor) -> Tensor:
        blocks = rows.view(-1, merge**2, rows.shape[1])
        return blocks.index_select(0, order).flatten(0, 1)

    places = to_device(get_vision_position_ids(sizes, merge), patches.device)
    hidden = by_window(tower.patch_embed(patches))
    rotary = tuple(by_window(part) for part in tower.rotary_pos_emb(hidden, places))
    for depth, block in enumerate(tower.blocks):
        is_whole = depth in tower.fullatt_block_indexes
        lengths = whole_lengths if is_whole else window_lengths
        hidden = block(hidden, cu_seqlens=lengths, position_embeddings=rotary)
        if depth + 1 < len(tower.blocks):
            yield None
    merged = tower.merger(hidden).index_select(0, order.argsort())
    yield merged.view(grid[0], -1, merged.shape[1])


def _patches_in_window(config: Any, rows: int, columns: int) -> float:
    """How many patches a patch attends to in a layer with windows, on average."""
    side = int(config.window_size // config.patch_size)

    def squares(length: int) -> int:
        whole, rest = divmod(length, side)
        return whole * side**2 + rest**2

    return squares(rows) * squares(columns) / (rows * columns)
