"""Gemma 3: frames go in as images between markers; windows in most layers.

A unit is a frame. Its visual tokens see each other, later ones too, and stand between the markers
of an image in the text. Positions count along the whole prompt, and tokens that stay keep their
own: so a window reaches as far back in time as without compression, and the markers of a frame stay
where they were. Frames are square, of one size; the processor's cropping ("pan and scan") is for
images that somebody looks at, and is not used.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from dycoke_core.compression.flops import TextGeometry, VisionGeometry
from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import (
    Clip,
    EmbeddedPrefix,
    LayerKind,
    LayerSpec,
    PromptLayout,
    Segment,
    Text,
    Units,
)
from dycoke_core.model.checkpoint import Checkpoint
from dycoke_core.model.geometry import layer_specs, text_geometry
from dycoke_core.model.layer_attention import LayerAttention
from dycoke_core.model.mrope import kept_places
from dycoke_core.model.transformers_model import TransformersModel
from dycoke_core.model_frames import Resizing
from dycoke_core.preprocess import FrameNormalizer, PromptEncoder, resizing_of_processor
from dycoke_core.sequence import ChatMessage, FrameTiming


@dataclass(slots=True, eq=False)
class Gemma3(TransformersModel):
    """A loaded checkpoint. Holds no state of any request."""

    model: Gemma3ForConditionalGeneration
    prompt_encoder: PromptEncoder
    normalizer: FrameNormalizer
    resizing: Resizing
    eos_token_ids: frozenset[int]
    weights_digest: str
    text_geometry: TextGeometry = field(init=False)
    layers: tuple[LayerSpec, ...] = field(init=False)
    _pixel_constants: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        config = self.model.config.text_config
        self.text_geometry = text_geometry(config)
        self.layers = layer_specs(config)
        self._pixel_constants = self.normalizer.constants(self.device)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "Gemma3":
        """Raises ModelLoadError: a part of the checkpoint is missing, or a setting unknown here."""
        config = checkpoint.config
        assert isinstance(config, Gemma3Config)
        if (
            config.text_config.attn_logit_softcapping
            or config.text_config.use_bidirectional_attention
        ):
            raise ModelLoadError(
                "config.json asks for attn_logit_softcapping or use_bidirectional_attention, "
                "which are not supported"
            )
        prompt_encoder = PromptEncoder(
            checkpoint.tokenizer,
            chat_template=checkpoint.chat_template,
            video_token_id=config.boi_token_index,
            unit_token_id=config.image_token_index,
            content_type="image",
        )
        settings = checkpoint.video_processor
        resizing = resizing_of_processor(settings, default="bilinear")  # before weights are read
        return cls(
            model=checkpoint.load_weights(Gemma3ForConditionalGeneration),
            prompt_encoder=prompt_encoder,
            normalizer=FrameNormalizer.of_processor(settings),
            resizing=resizing,
            eos_token_ids=checkpoint.eos_token_ids,
            weights_digest=checkpoint.weights_digest,
        )

    # --- sizes ---

    @property
    def image_size(self) -> int:
        return int(self.model.config.vision_config.image_size)

    @property
    def frames_per_unit(self) -> int:
        return 1

    @property
    def frame_resizing(self) -> Resizing:
        return self.resizing

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        side = int(self.model.config.mm_tokens_per_image**0.5)
        return side, side

    def vision_geometry(self, height: int, width: int) -> VisionGeometry:
        config = self.model.config.vision_config
        num_patches = (config.image_size // config.patch_size) ** 2
        num_tokens = self.tokens_per_unit(height, width)
        return VisionGeometry(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_mlp_matrices=2,
            num_layers=config.num_hidden_layers,
            num_patches=num_patches,
            num_attended=num_patches,
            patch_inputs=config.num_channels * config.patch_size**2,
            projector_products=config.hidden_size
            * self.text_geometry.hidden_size
            * num_tokens
            / num_patches,
            projector_values=3 * config.hidden_size
            + 3 * self.text_geometry.hidden_size * num_tokens / num_patches,
        )

    # --- prompts ---

    def clip(self, shape: tuple[int, ...], timing: FrameTiming | None) -> Clip:
        return self._clip_of_squares(shape, self.image_size)

    def lay_out(
        self,
        messages: tuple[ChatMessage, ...],
        clip: Clip | None,
        video_turn: int | None = None,
    ) -> PromptLayout:
        if clip is None:
            return PromptLayout.without_video(self.prompt_encoder(messages, has_video=False))
        rendered = self.prompt_encoder.render(messages, video_turn=video_turn)
        start, unit = self.prompt_encoder.video_token, self.prompt_encoder.unit_token
        end = self.tokenizer.convert_ids_to_tokens(self.model.config.eoi_token_index)
        frames = f"\n\n{start}{unit}{end}\n\n" * clip.num_frames
        *before_units, question = self.prompt_encoder.split(rendered.replace(start, frames))
        prefix: list[Segment] = []
        for number, text in enumerate(before_units):
            prefix += [Text(text), Units(range(number, number + 1))]
        return PromptLayout(
            clip,
            tuple(prefix),
            question,
            num_units=clip.num_frames,
            tokens_per_unit=self.tokens_per_unit(clip.height, clip.width),
            sees_whole_units=True,
        )

    def next_position(self, layout: PromptLayout, num_visual: int) -> int:
        return layout.num_prefix_text + layout.num_units * layout.tokens_per_unit

    def encode_frames(self, frames: Tensor) -> Iterator[Tensor | None]:
        """uint8 [F, S, S, 3] on the model's device → visual tokens [F, N, D].

        Source: `Gemma3Model.get_image_features`, which it equals (tested).
        """
        model = self.model.model
        tower = getattr(model.vision_tower, "vision_model", model.vision_tower)
        pixels = self.normalizer(frames, self.dtype, self._pixel_constants)
        hidden = tower.get_submodule("embeddings")(pixels)
        layers = list(tower.get_submodule("encoder.layers").children())
        for depth, layer in enumerate(layers, start=1):
            output = layer(hidden, attention_mask=None)
            hidden = output[0] if isinstance(output, tuple) else output
            if depth < len(layers):
                yield None
        hidden = tower.get_submodule("post_layernorm")(hidden)
        features = model.multi_modal_projector(hidden)
        assert isinstance(features, Tensor)
        yield features

    def embed(
        self, layout: PromptLayout, features: Tensor, kept: Tensor, kept_per_unit: tuple[int, ...]
    ) -> EmbeddedPrefix:
        visual = layout.visual_runs(kept_per_unit)
        visual_rows = features.flatten(0, 1).index_select(0, kept)
        embeds, _ = self._interleaved(layout, visual_rows, visual)
        positions = kept_places(layout, kept, kept_per_unit)[None]
        return EmbeddedPrefix(embeds, positions, visual, sees_whole_runs=True)

    # --- the language model ---

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        attention: LayerAttention,
        layer_adds: Tensor | None = None,
    ) -> Tensor:
        assert layer_adds is None, "these layers add nothing"
        mask = dict.fromkeys(LayerKind)  # the engine's attention masks
        return self._run_layers(embeds, positions, attention, attention_mask=mask)
