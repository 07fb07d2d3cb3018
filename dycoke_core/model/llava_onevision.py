"""LLaVA-OneVision behind the engine's seam (`dycoke_core.model.adapter`).

A unit is a frame. Frames are square, of one size; their visual tokens stand together, a learned
newline ends them, and positions count along what is kept. The layers are transformers' own;
attention and cache come with each forward call (`dycoke_core.model.attention`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from dycoke_core.compression.flops import TextGeometry, VisionGeometry
from dycoke_core.errors import InvalidRequestError, ModelLoadError
from dycoke_core.model import vision
from dycoke_core.model.adapter import (
    Clip,
    EmbeddedPrefix,
    LayerSpec,
    Newline,
    PromptLayout,
    Text,
    Units,
)
from dycoke_core.model.attention import LayerAttention
from dycoke_core.model.checkpoint import Checkpoint
from dycoke_core.model.geometry import layer_specs, text_geometry
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
            raise ModelLoadError("only vision_feature_select_strategy 'full' is supported")
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
        return vision.encode_frames(self.model.model, pixels)

    def clip(self, shape: tuple[int, ...], timing: FrameTiming | None) -> Clip:
        size = self.image_size
        if len(shape) != 4 or shape[0] < 1 or shape[1:] != (size, size, 3):
            raise InvalidRequestError(f"frames must be [F, {size}, {size}, 3] with F of at least 1")
        return Clip(*shape[:3])  # its prompts and positions tell no time

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
        output = self.model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=positions,
            use_cache=False,
            layer_attention=attention,
        )
        hidden = output.last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden[0]

    def _tokens_per_side(self) -> int:
        return math.ceil(self._grid_size() / 2)

    def _grid_size(self) -> int:
        config = self.model.config.vision_config
        return int(config.image_size) // int(config.patch_size)


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
        num_layers=vision.num_layers_run(model.model),
        num_patches=num_patches,
        num_attended=num_patches,
        patch_inputs=config.num_channels * config.patch_size**2,
        projector_products=projector_size * (feature_size + projector_size),
        projector_values=2 * feature_size + 3 * projector_size,
    )
