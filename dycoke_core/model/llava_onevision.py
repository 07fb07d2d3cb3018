"""LLaVA-OneVision behind the engine's seam (`dycoke_core.model.adapter`).

A unit is a frame. Frames are square, of one size; their visual tokens stand together, a learned
newline ends them, and positions count along what is kept. The layers are transformers' own;
attention and cache come with each forward call (`dycoke_core.model.layer_attention`).
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from dycoke_core.compression.flops import TextGeometry, VisionGeometry
from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import (
    Clip,
    EmbeddedPrefix,
    LayerSpec,
    Newline,
    PromptLayout,
    Text,
    Units,
)
from dycoke_core.model.checkpoint import Checkpoint
from dycoke_core.model.geometry import layer_specs, text_geometry
from dycoke_core.model.layer_attention import LayerAttention
from dycoke_core.model.transformers_model import TransformersModel
from dycoke_core.preprocess import FrameNormalizer, PromptEncoder
from dycoke_core.sequence import ChatMessage, FrameTiming


@dataclass(slots=True, eq=False)
class LlavaOnevision(TransformersModel):
    """A loaded checkpoint. Holds no state of any request."""

    model: LlavaOnevisionForConditionalGeneration
    prompt_encoder: PromptEncoder
    normalizer: FrameNormalizer
    eos_token_ids: frozenset[int]
    weights_digest: str
    text_geometry: TextGeometry = field(init=False)
    layers: tuple[LayerSpec, ...] = field(init=False)
    _vision_geometry: VisionGeometry = field(init=False)
    _pixel_constants: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.text_geometry = text_geometry(self.model.config.text_config)
        self.layers = layer_specs(self.model.config.text_config)
        self._vision_geometry = _vision_geometry(self.model)
        self._pixel_constants = self.normalizer.constants(self.device)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "LlavaOnevision":
        """Raises ModelLoadError: a part of the checkpoint is missing, or a setting unknown here."""
        config = checkpoint.config
        assert isinstance(config, LlavaOnevisionConfig)
        if config.vision_feature_select_strategy != "full":
            raise ModelLoadError(
                "config.json's vision_feature_select_strategy must be 'full'; no other is supported"
            )
        prompt_encoder = PromptEncoder(
            checkpoint.tokenizer,
            chat_template=checkpoint.chat_template,
            video_token_id=config.video_token_id,
        )
        return cls(
            model=checkpoint.load_weights(LlavaOnevisionForConditionalGeneration),
            prompt_encoder=prompt_encoder,
            normalizer=FrameNormalizer.of_processor(checkpoint.video_processor),
            eos_token_ids=checkpoint.eos_token_ids,
            weights_digest=checkpoint.weights_digest,
        )

    @property
    def image_size(self) -> int:
        return int(self.model.config.vision_config.image_size)

    @property
    def tokens_per_frame(self) -> int:
        """N: the patch grid, halved per side and rounded up by the pooling."""
        return self._tokens_per_side() ** 2

    @property
    def frames_per_unit(self) -> int:
        return 1

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        return self._tokens_per_side(), self._tokens_per_side()

    def vision_geometry(self, height: int, width: int) -> VisionGeometry:
        return self._vision_geometry

    def encode_frames(self, frames: Tensor) -> Iterator[Tensor | None]:
        """uint8 [F, S, S, 3] on the model's device → visual tokens [F, N, D]."""
        pixels = self.normalizer(frames, self.dtype, self._pixel_constants)
        return encode_frames(self.model.model, pixels)

    def clip(self, shape: tuple[int, ...], timing: FrameTiming | None) -> Clip:
        return self._clip_of_squares(shape, self.image_size)

    def lay_out(
        self,
        messages: tuple[ChatMessage, ...],
        clip: Clip | None,
        video_turn: int | None = None,
    ) -> PromptLayout:
        has_video = clip is not None
        prompt = self.prompt_encoder(messages, has_video=has_video, video_turn=video_turn)
        if clip is None:
            return PromptLayout.without_video(prompt)
        prefix = (Text(prompt.ids_before_video), Units(range(clip.num_frames)), Newline())
        return PromptLayout(
            clip,
            prefix,
            prompt.ids_after_video,
            num_units=clip.num_frames,
            tokens_per_unit=self.tokens_per_frame,
        )

    def next_position(self, layout: PromptLayout, num_visual: int) -> int:
        return layout.num_prefix_text + num_visual

    def embed(
        self, layout: PromptLayout, features: Tensor, kept: Tensor, kept_per_unit: tuple[int, ...]
    ) -> EmbeddedPrefix:
        text = layout.prefix[0]
        assert isinstance(text, Text)
        visual_tokens = features.flatten(0, 1).index_select(0, kept)
        embeds, positions = self.embed_prefix(text.token_ids, visual_tokens)
        return EmbeddedPrefix(embeds, positions, layout.visual_runs(kept_per_unit))

    def embed_prefix(
        self, ids_before_video: tuple[int, ...], visual_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[V, D] visual tokens → [P, D] embeddings and int64 [axes, P] positions of a prefix."""
        newline = self.model.model.image_newline.to(visual_tokens)[None]
        embeds = torch.cat([self.embed_tokens(ids_before_video), visual_tokens, newline])
        return embeds, torch.arange(len(embeds), device=embeds.device)[None]

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        attention: LayerAttention,
        layer_adds: Tensor | None = None,
    ) -> Tensor:
        assert layer_adds is None, "these layers add nothing"
        return self._run_layers(embeds, positions, attention)

    def _tokens_per_side(self) -> int:
        return math.ceil(self._grid_size() / 2)

    def _grid_size(self) -> int:
        config = self.model.config.vision_config
        return int(config.image_size) // int(config.patch_size)


def encode_frames(model: LlavaOnevisionModel, pixel_values: Tensor) -> Iterator[Tensor | None]:
    """Runs the vision tower up to its feature layer, then projects and pools.

    A generator, so that other work can run between layers: None after every layer but the last,
    the features in the end.

    Args:
        pixel_values: [F, 3, S, S] in the model's dtype.

    Yields:
        None, and at last [F, N, D] features of the language model's width.

    Source: LLaVA-OneVision's video path; equal to transformers' `get_video_features` (tested) but
        for the newline, which that appends in the same call: stage I has to come before it.
    """
    hidden = yield from run_tower(model, pixel_values)
    pooled = model.apply_pooling(model.multi_modal_projector(hidden))
    assert isinstance(pooled, Tensor)
    yield pooled


def num_layers_run(model: LlavaOnevisionModel) -> int:
    """Layers of the tower that the features need; `vision_feature_layer` counts the embedding."""
    return max(_feature_depths(model))


def run_tower(model: LlavaOnevisionModel, pixel_values: Tensor) -> Generator[None, None, Tensor]:
    """Hidden states at the feature layers, concatenated: [F, patches, features].

    Steps through the layers instead of asking for all hidden states, which would hold every layer's
    and run layers that no feature needs.
    """
    tower: nn.Module = getattr(model.vision_tower, "vision_model", model.vision_tower)
    depths = _feature_depths(model)
    hidden = tower.get_submodule("embeddings")(pixel_values)
    layers = list(tower.get_submodule("encoder.layers").children())
    by_depth = {0: hidden}
    for depth, layer in enumerate(layers[: max(depths)], start=1):
        output = layer(hidden, attention_mask=None)
        hidden = output[0] if isinstance(output, tuple) else output
        if depth in depths:
            by_depth[depth] = hidden
        if depth < max(depths):
            yield
    return torch.cat([by_depth[depth] for depth in depths], dim=-1)


def _feature_depths(model: LlavaOnevisionModel) -> list[int]:
    """How many layers run before each feature layer; -1 names the last layer's output."""
    num_layers = model.config.vision_config.num_hidden_layers
    layer = model.config.vision_feature_layer
    wanted = [layer] if isinstance(layer, int) else list(layer)
    return [place if place >= 0 else num_layers + 1 + place for place in wanted]


def _vision_geometry(model: LlavaOnevisionForConditionalGeneration) -> VisionGeometry:
    config = model.config.vision_config
    feature_layer = model.config.vision_feature_layer
    num_feature_layers = 1 if isinstance(feature_layer, int) else len(feature_layer)
    num_patches = (config.image_size // config.patch_size) ** 2
    feature_size = config.hidden_size * num_feature_layers
    projector_size = model.config.text_config.hidden_size
    return VisionGeometry(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_mlp_matrices=2,
        num_layers=num_layers_run(model.model),
        num_patches=num_patches,
        num_attended=num_patches,
        patch_inputs=config.num_channels * config.patch_size**2,
        projector_products=projector_size * (feature_size + projector_size),
        projector_values=2 * feature_size + 3 * projector_size,
    )
