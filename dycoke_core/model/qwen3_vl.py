"""Qwen3-VL: a run of visual tokens per unit after its time in words; features for several layers.

The tower hands over features of some of its layers beside the last one's (DeepStack): each is added
to the visual tokens' rows after one of the language model's first layers. Those rows are chosen by
the same kept set, and need no mask: what is added to text is zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from dycoke_core.compression.flops import VisionGeometry
from dycoke_core.model.adapter import Clip, PromptLayout, Segment, Text, Units
from dycoke_core.model.qwen_vl import QwenVL
from dycoke_core.model.temporal_patches import DEFAULT_FPS
from dycoke_core.model_frames import Spread
from dycoke_core.transfer import to_device


@dataclass(slots=True, eq=False)
class Qwen3VL(QwenVL):
    model_class: ClassVar[type[PreTrainedModel]] = Qwen3VLForConditionalGeneration
    frame_spread: ClassVar[Spread] = "nearest"
    limits_whole_video: ClassVar[bool] = True
    takes_whole_units: ClassVar[bool] = False
    processor_defaults: ClassVar[dict[str, Any]] = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    }

    @property
    def feature_size(self) -> int:
        num_extra = len(self.model.config.vision_config.deepstack_visual_indexes)
        return self.text_geometry.hidden_size * (1 + num_extra)

    def vision_geometry(self, height: int, width: int) -> VisionGeometry:
        config, patches = self.model.config.vision_config, self.patches
        rows, columns = patches.grid(height, width)
        merged_size = config.hidden_size * patches.merge**2
        num_mergers = 1 + len(config.deepstack_visual_indexes)
        return VisionGeometry(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_mlp_matrices=2,
            num_layers=config.depth,
            num_patches=rows * columns,
            num_attended=rows * columns,
            patch_inputs=config.in_channels * patches.temporal * patches.patch**2,
            projector_products=num_mergers
            * merged_size
            * (merged_size + config.out_hidden_size)
            / patches.merge**2,
            projector_values=4 * config.hidden_size
            + 2 * num_mergers * config.out_hidden_size / patches.merge**2,
            is_rotary=True,
        )

    def _lay_out(self, rendered: str, clip: Clip) -> PromptLayout:
        token = self.prompt_encoder.video_token
        times = self._unit_times(clip)
        units = "".join(
            f"<{time:.1f} seconds><|vision_start|>{token}<|vision_end|>" for time in times
        )
        *before_units, question = self.prompt_encoder.split(rendered.replace(token, units))
        prefix: list[Segment] = []
        for unit, text in enumerate(before_units):
            prefix += [Text(text), Units(range(unit, unit + 1))]
        return PromptLayout(
            clip,
            tuple(prefix),
            question,
            num_units=len(times),
            tokens_per_unit=self.tokens_per_unit(clip.height, clip.width),
        )

    def _unit_times(self, clip: Clip) -> list[float]:
        """Seconds of each unit: the middle of its first and last frame's.

        Source: `Qwen3VLProcessor._calculate_timestamps`; without metadata it takes 24 a second.
        """
        if clip.timing is None:
            frames = [index / DEFAULT_FPS for index in range(clip.num_frames)]
        else:
            frames = list(clip.timing.timestamps_s)
        size = self.patches.temporal
        frames += frames[-1:] * (-len(frames) % size)
        firsts = range(0, len(frames), size)
        return [(frames[first] + frames[first + size - 1]) / 2 for first in firsts]

    def _encode(self, patches: Tensor, grid: tuple[int, int, int]) -> Iterator[Tensor | None]:
        return _encode(self.model.model.visual, patches, grid)

    def _adds_of_pass(self, num_rows: int, layer_adds: Tensor | None) -> dict[str, Any]:
        if layer_adds is None:
            return {}
        is_first = torch.arange(num_rows, device=layer_adds.device) < layer_adds.shape[1]
        return {
            "visual_pos_masks": is_first[None],
            "deepstack_visual_embeds": list(layer_adds),
        }


def _encode(tower: Any, patches: Tensor, grid: tuple[int, int, int]) -> Iterator[Tensor | None]:
    """Units attend to themselves in whole; features of several layers, side by side.

    Source: `Qwen3VLVisionModel.forward`, which it equals (tested).
    """
    sizes = torch.tensor([grid])  # on the host, as are the lengths by which attention is split
    merge, device = tower.spatial_merge_size, patches.device
    lengths = get_vision_cu_seqlens(sizes)
    indices, weights = get_vision_interpolation_indices_and_weights(
        sizes,
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=merge,
    )
    places = to_device(get_vision_position_ids(sizes, merge), device)
    hidden = tower.patch_embed(patches)
    table, shares = tower.pos_embed(to_device(indices, device)), to_device(weights, device)
    hidden = hidden + (table * shares[:, :, None]).sum(1).to(hidden.dtype)
    rotary = tower.rotary_pos_emb(hidden, places)
    depths = list(tower.deepstack_visual_indexes)
    extra: dict[int, Tensor] = {}
    for depth, block in enumerate(tower.blocks):
        hidden = block(hidden, cu_seqlens=lengths, position_embeddings=rotary)
        if depth in depths:
            extra[depth] = tower.deepstack_merger_list[depths.index(depth)](hidden)
        if depth + 1 < len(tower.blocks):
            yield None
    features = torch.cat([tower.merger(hidden), *(extra[depth] for depth in depths)], dim=1)
    yield features.view(grid[0], -1, features.shape[1])
