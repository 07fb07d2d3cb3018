"""What the engine asks of a video language model: the seam at which a family of models joins.

A model reads a video in *units*: a frame, or a temporal patch of several. Each unit becomes N
visual tokens, and N may depend on the frames' size. A prompt is a list of segments: text, and units
in any number of runs. Everything up to the last unit is the *prefix*, which all questions about the
video share; the question is what follows.

    lay_out → encode_frames → [stage I] → embed → forward … forward → logits

Knows no cache, no step and no policy. A family is a class of this form and a line in
`dycoke_core.model.loader`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from dycoke_core.compression.flops import TextGeometry, VisionGeometry
from dycoke_core.frame_rate import RateRule
from dycoke_core.model.layer_attention import LayerAttention
from dycoke_core.model_frames import PixelLimits, Resizing, Spread
from dycoke_core.preprocess import Prompt
from dycoke_core.sequence import ChatMessage, FrameTiming


class LayerKind(StrEnum):
    """What a layer's queries attend to, in transformers' words."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A layer of the language model, as a cache sees it.

    Args:
        window: tokens that a query sees, its own included; None: all before it.
    """

    kind: LayerKind
    num_kv_heads: int  # G
    head_size: int  # E
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Clip:
    """What a prompt's layout depends on of a video's frames."""

    num_frames: int
    height: int  # pixels
    width: int
    timing: FrameTiming | None = None


@dataclass(frozen=True, slots=True)
class Text:
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Units:
    """Visual tokens of consecutive units, with nothing between them."""

    indices: range


@dataclass(frozen=True, slots=True)
class Newline:
    """One embedding of the model's own that no token id names. It is never dropped."""


Segment = Text | Units | Newline


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """A conversation around a video, before anything is dropped.

    Args:
        clip: None: there is no video, and the prefix is one token.
        prefix: up to the question.
        question_ids: the rest of the prompt.
        sees_whole_units: a visual token sees those of its unit that come after it, too. Then no
            two units stand together.
    """

    clip: Clip | None
    prefix: tuple[Segment, ...]
    question_ids: tuple[int, ...]
    num_units: int
    tokens_per_unit: int  # N
    sees_whole_units: bool = False

    @classmethod
    def without_video(cls, prompt: Prompt) -> "PromptLayout":
        """Args: prompt: cut after its first id."""
        prefix = (Text(prompt.ids_before_video),)
        return cls(None, prefix, prompt.ids_after_video, num_units=0, tokens_per_unit=0)

    @property
    def text_ids(self) -> tuple[int, ...]:
        """Of the prefix, whatever stands between them."""
        texts = (segment.token_ids for segment in self.prefix if isinstance(segment, Text))
        return tuple(token_id for ids in texts for token_id in ids)

    @property
    def num_prefix_text(self) -> int:
        """Tokens of the prefix that are not visual."""
        sizes = (
            len(segment.token_ids) if isinstance(segment, Text) else isinstance(segment, Newline)
            for segment in self.prefix
        )
        return sum(sizes)

    def visual_runs(self, kept_per_unit: Sequence[int]) -> tuple[range, ...]:
        """Places of the visual tokens in a prefix that keeps this many of each unit, ascending."""
        runs: list[range] = []
        place = 0
        for segment in self.prefix:
            if isinstance(segment, Text):
                place += len(segment.token_ids)
            elif isinstance(segment, Newline):
                place += 1
            else:
                end = place + sum(kept_per_unit[unit] for unit in segment.indices)
                if end > place:
                    runs.append(range(place, end))
                place = end
        return tuple(runs)


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedPrefix:
    """A prefix as the layers take it.

    Args:
        embeds: [P, D].
        positions: int64 [axes, P].
        visual: places of the visual tokens, as ascending runs.
        layer_adds: [layers, P, D], what each of the first layers adds to its output. None: no
            layer of this model ever adds anything; a prefix of text alone adds zeros.
        sees_whole_runs: a visual token sees those of its run that come after it, too.
    """

    embeds: Tensor
    positions: Tensor
    visual: tuple[range, ...]
    layer_adds: Tensor | None = None
    sees_whole_runs: bool = False


class VideoLanguageModel(Protocol):
    """A loaded checkpoint. Holds no state of any request."""

    @property
    def architecture(self) -> str:
        """As `config.json` names it."""
        ...

    @property
    def weights_digest(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def max_model_tokens(self) -> int: ...

    # --- sizes ---

    @property
    def text_geometry(self) -> TextGeometry: ...

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Of the language model, first to last."""
        ...

    @property
    def num_position_axes(self) -> int:
        """Positions that a token has: 1, where they count along the sequence."""
        ...

    @property
    def frames_per_unit(self) -> int: ...

    @property
    def image_size(self) -> int:
        """Side of the square frames that suit the model, in pixels."""
        ...

    @property
    def frame_limits(self) -> PixelLimits | None:
        """Of frames that keep their shape; None: the model takes square ones alone."""
        ...

    @property
    def frame_spread(self) -> Spread:
        """Which frames of a clip its processor takes."""
        ...

    @property
    def frame_rate(self) -> RateRule | None:
        """How many frames of a clip a rate makes; None: its length times the rate, rounded down."""
        ...

    @property
    def frame_resizing(self) -> Resizing:
        """How they come to their size."""
        ...

    @property
    def feature_size(self) -> int:
        """Values of a visual token's features: the D that it is embedded as, then those that the
        first layers add."""
        ...

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that a unit's N tokens stand in, row after row, of frames of a size in
        pixels that the model takes."""
        ...

    def tokens_per_unit(self, height: int, width: int) -> int:
        """N: the tokens of such a grid."""
        ...

    def vision_geometry(self, height: int, width: int) -> VisionGeometry:
        """What the tower computes for a unit of frames of this size."""
        ...

    # --- prompts ---

    def clip(self, shape: tuple[int, ...], timing: FrameTiming | None) -> Clip:
        """What frames of this shape are to the model.

        Raises:
            InvalidRequestError: it cannot take them.
        """
        ...

    def lay_out(
        self,
        messages: tuple[ChatMessage, ...],
        clip: Clip | None,
        video_turn: int | None = None,
    ) -> PromptLayout:
        """Renders a conversation around a video, or without one.

        Args:
            video_turn: index of the user turn that the video belongs to; None: the first one.

        Raises:
            InvalidRequestError: messages that the model cannot take.
        """
        ...

    def next_position(self, layout: PromptLayout, num_visual: int) -> int:
        """Of the first token after a prefix that keeps this many visual tokens, on every axis;
        later tokens continue from there."""
        ...

    def encode_frames(self, frames: Tensor) -> Iterator[Tensor | None]:
        """Frames of whole units → their visual tokens' features.

        Args:
            frames: uint8 [units * frames_per_unit, height, width, 3] on the model's device.

        Yields:
            None after every layer of the tower but the last, and in the end [units, N, features].
        """
        ...

    def embed(
        self, layout: PromptLayout, features: Tensor, kept: Tensor, kept_per_unit: tuple[int, ...]
    ) -> EmbeddedPrefix:
        """Puts a prefix together.

        Args:
            features: [units, N, features].
            kept: int64 [V], which of the units * N tokens stay, in the order they stand in.
            kept_per_unit: how many of each unit.
        """
        ...

    def embed_text(self, layout: PromptLayout) -> EmbeddedPrefix:
        """Puts a prefix without a video together."""
        ...

    def embed_tokens(self, token_ids: Sequence[int]) -> Tensor:
        """[len(token_ids), D]."""
        ...

    def integers(self, values: Sequence[int]) -> Tensor:
        """int64 [len(values)] on the device; the host does not wait for the copy."""
        ...

    # --- the language model ---

    @property
    def language_model(self) -> nn.Module:
        """The decoder without its head, for a backend that runs the layers itself."""
        ...

    @property
    def lm_head(self) -> nn.Module: ...

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        attention: LayerAttention,
        layer_adds: Tensor | None = None,
    ) -> Tensor:
        """Runs the language model's layers over new tokens.

        Args:
            embeds: [q, D]; positions: int64 [axes, q].
            attention: stores the new keys and values and attends, layer by layer.
            layer_adds: [layers, rows, D], added to the first rows after each of the first layers.

        Returns:
            [q, D] after the final norm.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, D] → float32 [rows, vocabulary]."""
        ...
