"""LLaVA-OneVision as the engine sees it: encode frames, embed a prompt, run layers, give logits.

The layers are transformers' own; attention and cache come with each forward call
(`dycoke_core.model.attention`). Another video language model joins as another class of this shape.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_core.compression.flops import TextGeometry, VisionGeometry
from dycoke_core.model import vision
from dycoke_core.model.attention import LayerAttention
from dycoke_core.preprocess import FrameNormalizer, PromptEncoder
from dycoke_core.transfer import to_device


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

    def __post_init__(self) -> None:
        self.text_geometry = _text_geometry(self.model)
        self.vision_geometry = _vision_geometry(self.model)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.model.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def image_size(self) -> int:
        return int(self.model.config.vision_config.image_size)

    @property
    def tokens_per_frame(self) -> int:
        """N: the patch grid, halved per side and rounded up by the pooling."""
        return math.ceil(self._grid_size() / 2) ** 2

    @property
    def max_model_tokens(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    def encode_frames(self, frames: Tensor, slice_layers: int) -> Iterator[Tensor | None]:
        """uint8 [F, S, S, 3] on any device → visual tokens [F, N, D] on the model's.

        Yields None after every `slice_layers` layers of the tower, and the tokens in the end.
        """
        pixels = self.normalizer(frames.to(self.device), self.dtype)
        return vision.encode_frames(self.model.model, pixels, slice_layers)

    def embed_prefix(self, ids_before_video: tuple[int, ...], visual_tokens: Tensor) -> Tensor:
        """[V, D] visual tokens → [P, D]: text, visual tokens, newline."""
        newline = self.model.model.image_newline.to(visual_tokens)[None]
        return torch.cat([self.embed_tokens(ids_before_video), visual_tokens, newline])

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
            embeds: [q, D]; positions: int64 [q].
            attention: stores the new keys and values and attends, layer by layer.

        Returns:
            [q, D] after the final norm.
        """
        output = self.model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
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
