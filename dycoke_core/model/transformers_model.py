"""What every video language model of transformers gives the engine, whatever its family."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from dycoke_core.compression.flops import TextGeometry
from dycoke_core.errors import InvalidRequestError
from dycoke_core.frame_rate import RateRule
from dycoke_core.model.adapter import Clip, EmbeddedPrefix, PromptLayout
from dycoke_core.model.layer_attention import LayerAttention
from dycoke_core.model_frames import DEFAULT_RESIZING, DEFAULT_SPREAD, PixelLimits, Resizing, Spread
from dycoke_core.preprocess import PromptEncoder
from dycoke_core.transfer import to_device


class TransformersModel(ABC):
    """The part of an adapter that does not depend on the family (`dycoke_core.model.adapter`)."""

    __slots__ = ()

    model: Any  # a class for conditional generation: tower, language model, lm_head
    prompt_encoder: PromptEncoder
    text_geometry: TextGeometry

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.model.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.prompt_encoder.tokenizer

    @property
    def language_model(self) -> nn.Module:
        module = self.model.model.language_model
        assert isinstance(module, nn.Module)
        return module

    @property
    def lm_head(self) -> nn.Module:
        module = self.model.lm_head
        assert isinstance(module, nn.Module)
        return module

    @property
    def max_model_tokens(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def feature_size(self) -> int:
        return self.text_geometry.hidden_size

    @property
    def num_position_axes(self) -> int:
        return 1

    @property
    def frame_limits(self) -> PixelLimits | None:
        return None

    @property
    def frame_spread(self) -> Spread:
        return DEFAULT_SPREAD

    @property
    def frame_rate(self) -> RateRule | None:
        return None

    @property
    def frame_resizing(self) -> Resizing:
        return DEFAULT_RESIZING

    @abstractmethod
    def token_grid(self, height: int, width: int) -> tuple[int, int]: ...

    def tokens_per_unit(self, height: int, width: int) -> int:
        rows, columns = self.token_grid(height, width)
        return rows * columns

    @staticmethod
    def _clip_of_squares(shape: tuple[int, ...], size: int) -> Clip:
        """Of a model that takes square frames of one size, and whose prompts tell no time.

        Raises:
            InvalidRequestError: the frames are others.
        """
        if len(shape) != 4 or shape[0] < 1 or shape[1:] != (size, size, 3):
            raise InvalidRequestError(f"frames must be [F, {size}, {size}, 3] with F of at least 1")
        return Clip(*shape[:3])

    def embed_text(self, layout: PromptLayout) -> EmbeddedPrefix:
        embeds = self.embed_tokens(layout.text_ids)
        positions = torch.arange(len(embeds), device=embeds.device)
        num_adding = self.feature_size // self.text_geometry.hidden_size - 1
        return EmbeddedPrefix(
            embeds,
            positions.expand(self.num_position_axes, -1),
            (),
            embeds.new_zeros((num_adding, *embeds.shape)) if num_adding else None,
        )

    def _interleaved(
        self, layout: PromptLayout, visual_rows: Tensor, visual: Sequence[range]
    ) -> tuple[Tensor, Tensor]:
        """A prefix's text with its visual tokens' embeddings.

        Args:
            visual_rows: [V, D].
            visual: their places, as ascending runs.

        Returns:
            [P, D], and the places: int64 [V].
        """
        is_visual = [place for run in visual for place in run]
        num_tokens = layout.num_prefix_text + len(is_visual)
        is_text = sorted(set(range(num_tokens)) - set(is_visual))
        visual_places = self.integers(is_visual)
        embeds = visual_rows.new_empty((num_tokens, visual_rows.shape[1]))
        embeds.index_copy_(0, self.integers(is_text), self.embed_tokens(layout.text_ids))
        embeds.index_copy_(0, visual_places, visual_rows)
        return embeds, visual_places

    def embed_tokens(self, token_ids: Sequence[int]) -> Tensor:
        embedded = self.model.get_input_embeddings()(self.integers(token_ids))
        assert isinstance(embedded, Tensor)
        return embedded

    def integers(self, values: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.long), self.device)

    def _run_layers(
        self, embeds: Tensor, position_ids: Tensor, attention: LayerAttention, **settings: Any
    ) -> Tensor:
        """[q, D] → [q, D] after the final norm. Settings: of the family's own language model."""
        output = self.model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=position_ids,
            use_cache=False,
            layer_attention=attention,
            **settings,
        )
        hidden = output.last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden)
        assert isinstance(logits, Tensor)
        return logits.float()
