"""LLaVA-OneVision as the engine sees it: encode frames, embed a prompt, run layers, give logits.

The layers are transformers' own; attention and cache come with each forward call
(`dycoke_core.model.attention`). Another video language model joins as another class of this shape.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_core.compression.flops import TextGeometry, VisionGeometry
from dycoke_core.model import vision
from dycoke_core.model.attention import LayerAttention
from dycoke_core.preprocess import FrameNormalizer, PromptEncoder
from dycoke_core.transfer import to_device


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """Args:
    visual: places of the visual tokens, as ascending runs.
    next_position: of the first token behind the prefix, on every axis.
    """

    num_tokens: int
    visual: tuple[range, ...]
    next_position: int


@dataclass(slots=True, eq=False)
class LlavaOnevision:
    """A loaded checkpoint. Holds no state of any request."""

    model: LlavaOnevisionForConditionalGeneration
    prompt_encoder: PromptEncoder
    normalizer: FrameNormalizer
    eos_token_ids: frozenset[int]
    weights_digest: str
    text_geometry: TextGeometry = field(init=False)
    vision_geometry: VisionGeometry = field(init=False)
    _pixel_constants: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.text_geometry = _text_geometry(self.model)
        self.vision_geometry = _vision_geometry(self.model)
        self._pixel_constants = self.normalizer.constants(self.device)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.model.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def language_model(self) -> nn.Module:
        """The decoder without its head."""
        module = self.model.model.language_model
        assert isinstance(module, nn.Module)
        return module

    @property
    def lm_head(self) -> nn.Module:
        module = self.model.lm_head
        assert isinstance(module, nn.Module)
        return module

    @property
    def image_size(self) -> int:
        return int(self.model.config.vision_config.image_size)

    @property
    def tokens_per_frame(self) -> int:
        """N: the patch grid, halved per side and rounded up by the pooling."""
        return math.ceil(self._grid_size() / 2) ** 2

    @property
    def num_position_axes(self) -> int:
        """Positions that a token has: 1, where they count along the sequence."""
        return 1

    @property
    def max_model_tokens(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    def encode_frames(self, frames: Tensor) -> Iterator[Tensor | None]:
        """uint8 [F, S, S, 3] on the model's device → visual tokens [F, N, D].

        Yields None after every layer of the tower but the last, and the tokens in the end.
        """
        pixels = self.normalizer(frames, self.dtype, self._pixel_constants)
        return vision.encode_frames(self.model.model, pixels)

    def lay_out_prefix(self, num_ids_before_video: int, num_visual: int) -> PromptLayout:
        """Where things are in a prefix: text, visual tokens, newline."""
        num_tokens = num_ids_before_video + num_visual + 1
        visual = range(num_ids_before_video, num_ids_before_video + num_visual)
        return PromptLayout(num_tokens, (visual,) if num_visual else (), next_position=num_tokens)

    def lay_out_text(self, num_ids: int) -> PromptLayout:
        """Of a prefix without a video."""
        return PromptLayout(num_ids, visual=(), next_position=num_ids)

    def embed_text(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[P, D] embeddings and int64 [axes, P] positions of a prefix without a video."""
        embeds = self.embed_tokens(token_ids)
        return embeds, torch.arange(len(embeds), device=embeds.device)[None]

    def embed_prefix(
        self, ids_before_video: tuple[int, ...], visual_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[V, D] visual tokens → [P, D] embeddings and int64 [axes, P] positions of a prefix."""
        newline = self.model.model.image_newline.to(visual_tokens)[None]
        embeds = torch.cat([self.embed_tokens(ids_before_video), visual_tokens, newline])
        return embeds, torch.arange(len(embeds), device=embeds.device)[None]

    def embed_tokens(self, token_ids: Sequence[int]) -> Tensor:
        """[len(token_ids), D]."""
        embedded = self.model.get_input_embeddings()(self.integers(token_ids))
        assert isinstance(embedded, Tensor)
        return embedded

    def integers(self, values: Sequence[int]) -> Tensor:
        """int64 [len(values)] on the device; the host does not wait for the copy."""
        return to_device(torch.tensor(values, dtype=torch.long), self.device)

    def forward(self, embeds: Tensor, positions: Tensor, attention: LayerAttention) -> Tensor:
        """Runs the language model's layers over new tokens.

        Args:
            embeds: [q, D]; positions: int64 [axes, q].
            attention: stores the new keys and values and attends, layer by layer.

        Returns:
            [q, D] after the final norm.
        """
        output = self.model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=positions,
            use_cache=False,
            layer_attention=attention,
        )
        hidden = output.last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, D] → float32 [rows, vocabulary]."""
        logits = self.model.lm_head(hidden)
        assert isinstance(logits, Tensor)
        return logits.float()

    def _grid_size(self) -> int:
        config = self.model.config.vision_config
        return int(config.image_size) // int(config.patch_size)


def _text_geometry(model: LlavaOnevisionForConditionalGeneration) -> TextGeometry:
    config = model.config.text_config
    num_heads = config.num_attention_heads
    return TextGeometry(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        vocab_size=config.vocab_size,
    )


def _vision_geometry(model: LlavaOnevisionForConditionalGeneration) -> VisionGeometry:
    config = model.config.vision_config
    feature_layer = model.config.vision_feature_layer
    num_feature_layers = 1 if isinstance(feature_layer, int) else len(feature_layer)
    return VisionGeometry(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=vision.num_layers_run(model.model),
        num_patches=(config.image_size // config.patch_size) ** 2,
        patch_inputs=config.num_channels * config.patch_size**2,
        feature_size=config.hidden_size * num_feature_layers,
        projector_size=model.config.text_config.hidden_size,
    )
