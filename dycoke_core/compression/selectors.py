"""Stage I selectors: which visual tokens the language model sees."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dycoke_core.compression import controls, counts, ttm, vidcom2
from dycoke_core.config import TtmVariant


class Selector(Protocol):
    """A stage I. It sees features and settings, never the question."""

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that the choice depends on, besides the features."""
        ...

    def count(self, num_frames: int, tokens_per_frame: int) -> int:
        """V, known before encoding."""
        ...

    def count_per_frame(self, num_frames: int, tokens_per_frame: int) -> tuple[int, ...] | None:
        """How many tokens of each frame stay; None if that depends on the features."""
        ...

    def select(self, features: Tensor) -> Tensor:
        """int64 [V] places among the F * N tokens of features [F, N, D]."""
        ...


@dataclass(frozen=True, slots=True)
class AllTokens:
    @property
    def key(self) -> tuple[object, ...]:
        return ("full",)

    def count(self, num_frames: int, tokens_per_frame: int) -> int:
        return num_frames * tokens_per_frame

    def count_per_frame(self, num_frames: int, tokens_per_frame: int) -> tuple[int, ...]:
        return (tokens_per_frame,) * num_frames

    def select(self, features: Tensor) -> Tensor:
        return torch.arange(features.shape[0] * features.shape[1], device=features.device)


@dataclass(frozen=True, slots=True)
class TemporalMerging:
    """DyCoke's stage I: `dycoke_core.compression.ttm`."""

    k: float
    window: int
    variant: TtmVariant

    @property
    def key(self) -> tuple[object, ...]:
        return ("ttm", self.k, self.window, self.variant)

    def count(self, num_frames: int, tokens_per_frame: int) -> int:
        return counts.count_tokens(
            num_frames, tokens_per_frame, self.k, window=self.window, variant=self.variant
        )

    def count_per_frame(self, num_frames: int, tokens_per_frame: int) -> tuple[int, ...]:
        return counts.count_per_frame(
            num_frames, tokens_per_frame, self.k, window=self.window, variant=self.variant
        )

    def select(self, features: Tensor) -> Tensor:
        return ttm.select_tokens(features, self.k, window=self.window, variant=self.variant)


@dataclass(frozen=True, slots=True)
class RandomTokens:
    k: float
    window: int
    seed: int

    @property
    def key(self) -> tuple[object, ...]:
        return ("random_ttm", self.k, self.window, self.seed)

    def count(self, num_frames: int, tokens_per_frame: int) -> int:
        return counts.count_tokens(num_frames, tokens_per_frame, self.k, window=self.window)

    def count_per_frame(self, num_frames: int, tokens_per_frame: int) -> tuple[int, ...]:
        return counts.count_per_frame(num_frames, tokens_per_frame, self.k, window=self.window)

    def select(self, features: Tensor) -> Tensor:
        return controls.select_random_tokens(features, self.k, window=self.window, seed=self.seed)


@dataclass(frozen=True, slots=True)
class FewerFrames:
    k: float
    window: int

    @property
    def key(self) -> tuple[object, ...]:
        return ("fewer_frames", self.k, self.window)

    def count(self, num_frames: int, tokens_per_frame: int) -> int:
        return sum(self.count_per_frame(num_frames, tokens_per_frame))

    def count_per_frame(self, num_frames: int, tokens_per_frame: int) -> tuple[int, ...]:
        kept = counts.fewer_frames(num_frames, tokens_per_frame, self.k, window=self.window)
        return tuple(tokens_per_frame * (frame in kept) for frame in range(num_frames))

    def select(self, features: Tensor) -> Tensor:
        return controls.select_fewer_frames(features, self.k, window=self.window)


@dataclass(frozen=True, slots=True)
class VidCom2:
    retained_ratio: float

    @property
    def key(self) -> tuple[object, ...]:
        return ("vidcom2", self.retained_ratio)

    def count(self, num_frames: int, tokens_per_frame: int) -> int:
        return vidcom2.count_tokens(num_frames, tokens_per_frame, self.retained_ratio)

    def count_per_frame(self, num_frames: int, tokens_per_frame: int) -> None:
        return None

    def select(self, features: Tensor) -> Tensor:
        return vidcom2.select_tokens(features, self.retained_ratio)
