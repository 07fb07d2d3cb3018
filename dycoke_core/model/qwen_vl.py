"""What Qwen's video language models have in common behind the engine's seam.

A unit is a temporal patch of two frames; N depends on the frames' size. Positions have three axes,
and visual tokens that stay keep their own. The wrapper of transformers stores a request's position
offset on the model; it is never called: tower and language model are, each with all that it needs.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dycoke_core.compression.flops import TextGeometry, VisionGeometry
from dycoke_core.frame_rate import PROCESSORS_MAX_FRAMES, PROCESSORS_MIN_FRAMES, RateRule
from dycoke_core.model.adapter import Clip, EmbeddedPrefix, LayerSpec, PromptLayout
from dycoke_core.model.checkpoint import Checkpoint
from dycoke_core.model.geometry import layer_specs, text_geometry
from dycoke_core.model.layer_attention import LayerAttention
from dycoke_core.model.mrope import (
    NUM_AXES,
    PositionsOfRun,
    RunPositions,
    kept_places,
    next_position,
    prefix_positions,
)
from dycoke_core.model.temporal_patches import TemporalPatches
from dycoke_core.model.transformers_model import TransformersModel
from dycoke_core.model_frames import PixelLimits, Resizing, Spread
from dycoke_core.preprocess import PromptEncoder, resizing_of_processor
from dycoke_core.sequence import ChatMessage, FrameTiming
from dycoke_core.transfer import to_device

_SIDE = 14  # tokens per side of the square frames that suit it: N = 196, as LLaVA-OneVision's
_USUAL_FRAMES = 32  # of a video whose limits are of all frames together
_NUM_GRIDS = 32  # whose positions are remembered


@dataclass(slots=True, eq=False)
class QwenVL(TransformersModel):
    """A loaded checkpoint. Holds no state of any request."""

    model_class: ClassVar[type[PreTrainedModel]]
    # What the model's video processor takes where a checkpoint's says nothing.
    processor_defaults: ClassVar[dict[str, Any]]
    frame_spread: ClassVar[Spread]
    limits_whole_video: ClassVar[bool]  # whether its pixel limits are of all frames together
    takes_whole_units: ClassVar[bool]  # of frames by a rate

    model: Any
    prompt_encoder: PromptEncoder
    patches: TemporalPatches
    rate: RateRule
    resizing: Resizing
    eos_token_ids: frozenset[int]
    weights_digest: str
    text_geometry: TextGeometry = field(init=False)
    layers: tuple[LayerSpec, ...] = field(init=False)
    _pixel_constants: tuple[Tensor, Tensor] = field(init=False)
    _positions_of_run: Callable[[int, int, int, float], RunPositions] = field(init=False)

    def __post_init__(self) -> None:
        self.text_geometry = text_geometry(self.model.config.text_config)
        self.layers = layer_specs(self.model.config.text_config)
        self._pixel_constants = self.patches.constants(self.device)
        self._positions_of_run = lru_cache(_NUM_GRIDS)(partial(_positions_of_run, self.model))

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Raises ModelLoadError: a part of the checkpoint is missing."""
        prompt_encoder = PromptEncoder(
            checkpoint.tokenizer,
            chat_template=checkpoint.chat_template,
            video_token_id=checkpoint.config.video_token_id,
        )
        settings = cls.processor_defaults | checkpoint.video_processor
        resizing = resizing_of_processor(settings, default="bicubic")  # before weights are read
        return cls(
            model=checkpoint.load_weights(cls.model_class),
            prompt_encoder=prompt_encoder,
            patches=TemporalPatches.of_processor(
                settings, limits_whole_video=cls.limits_whole_video
            ),
            rate=RateRule(
                min_frames=settings.get("min_frames") or PROCESSORS_MIN_FRAMES,
                max_frames=settings.get("max_frames") or PROCESSORS_MAX_FRAMES,
                multiple=settings["temporal_patch_size"] if cls.takes_whole_units else 1,
            ),
            resizing=resizing,
            eos_token_ids=checkpoint.eos_token_ids,
            weights_digest=checkpoint.weights_digest,
        )

    # --- sizes ---

    @property
    def num_position_axes(self) -> int:
        return NUM_AXES

    @property
    def frames_per_unit(self) -> int:
        return self.patches.temporal

    @property
    def image_size(self) -> int:
        side = _SIDE * self.patches.limits.multiple
        height, _ = self.patches.limits.fit(side, side, num_frames=_USUAL_FRAMES)
        return height

    @property
    def frame_limits(self) -> PixelLimits:
        return self.patches.limits

    @property
    def frame_rate(self) -> RateRule:
        return self.rate

    @property
    def frame_resizing(self) -> Resizing:
        return self.resizing

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        return self.patches.token_grid(height, width)

    @abstractmethod
    def vision_geometry(self, height: int, width: int) -> VisionGeometry: ...

    # --- prompts ---

    def clip(self, shape: tuple[int, ...], timing: FrameTiming | None) -> Clip:
        return self.patches.clip(shape, timing)

    def lay_out(
        self,
        messages: tuple[ChatMessage, ...],
        clip: Clip | None,
        video_turn: int | None = None,
    ) -> PromptLayout:
        if clip is None:
            return PromptLayout.without_video(self.prompt_encoder(messages, has_video=False))
        rendered = self.prompt_encoder.render(messages, video_turn=video_turn)
        return self._lay_out(rendered, clip)

    @abstractmethod
    def _lay_out(self, rendered: str, clip: Clip) -> PromptLayout:
        """Args: rendered: the conversation as text, its video as the video token."""

    def next_position(self, layout: PromptLayout, num_visual: int) -> int:
        if layout.clip is None:
            return layout.num_prefix_text
        return next_position(layout, self._of_run(layout.clip))

    def encode_frames(self, frames: Tensor) -> Iterator[Tensor | None]:
        patches = self.patches(frames, self.dtype, self._pixel_constants)
        num_units = len(frames) // self.patches.temporal
        return self._encode(patches, (num_units, *self.patches.grid(*frames.shape[1:3])))

    @abstractmethod
    def _encode(self, patches: Tensor, grid: tuple[int, int, int]) -> Iterator[Tensor | None]:
        """Runs the tower layer by layer: [units * rows * columns, inputs] → at last [units, N,
        features]. A unit attends to itself alone, so units of several videos go together."""

    def embed(
        self, layout: PromptLayout, features: Tensor, kept: Tensor, kept_per_unit: tuple[int, ...]
    ) -> EmbeddedPrefix:
        assert layout.clip is not None
        visual = layout.visual_runs(kept_per_unit)
        visual_rows = features.flatten(0, 1).index_select(0, kept)
        places = kept_places(layout, kept, kept_per_unit)
        positions = to_device(prefix_positions(layout, self._of_run(layout.clip)), self.device)
        size = self.text_geometry.hidden_size
        embeds, visual_places = self._interleaved(layout, visual_rows[:, :size], visual)
        return EmbeddedPrefix(
            embeds,
            positions.index_select(1, places),
            visual,
            _layer_adds(visual_rows[:, size:], visual_places, embeds),
        )

    def _of_run(self, clip: Clip) -> PositionsOfRun:
        rows, columns = self.patches.grid(clip.height, clip.width)
        seconds = self.patches.seconds_per_unit(clip)
        return lambda num_units: self._positions_of_run(num_units, rows, columns, seconds)

    # --- the language model ---

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        attention: LayerAttention,
        layer_adds: Tensor | None = None,
    ) -> Tensor:
        adds = self._adds_of_pass(len(embeds), layer_adds)
        return self._run_layers(embeds, positions[:, None], attention, **adds)

    def _adds_of_pass(self, num_rows: int, layer_adds: Tensor | None) -> dict[str, Any]:
        """What `layer_adds` is to the language model's forward."""
        assert layer_adds is None, "these layers add nothing"
        return {}


def _layer_adds(extra: Tensor, visual_places: Tensor, embeds: Tensor) -> Tensor | None:
    """[V, E * D] → [E, P, D], zeros where text is; None: E is 0."""
    num_rows, size = embeds.shape
    if not extra.shape[1]:
        return None
    per_layer = extra.view(len(extra), -1, size).transpose(0, 1)
    adds = extra.new_zeros((len(per_layer), num_rows, size))
    return adds.index_copy_(1, visual_places, per_layer)


def _positions_of_run(
    model: Any, num_units: int, rows: int, columns: int, seconds_per_unit: float
) -> RunPositions:
    """By transformers' own rule, in whichever release: a run, and a token after it."""
    num_visual = num_units * rows * columns // model.config.vision_config.spatial_merge_size**2
    is_video = torch.full((1, num_visual + 1), 2)
    is_video[0, -1] = 0
    positions, _ = model.model.get_rope_index(
        torch.zeros_like(is_video),
        mm_token_type_ids=is_video,
        video_grid_thw=torch.tensor([[num_units, rows, columns]]),
        second_per_grid_ts=torch.tensor([seconds_per_unit]),  # models that write it ignore it
    )
    return RunPositions(positions[:, 0, :-1], next_position=int(positions[0, 0, -1]))
