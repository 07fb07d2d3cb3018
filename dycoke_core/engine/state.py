"""What the engine knows of a running sequence beyond the `Sequence` itself.

Everything that belongs to a sequence hangs here and nowhere else; dropping the state frees it.
"""

import time
from dataclasses import dataclass, field

from torch import Tensor

from dycoke_core.compression.policies import Policy
from dycoke_core.engine.detokenizer import Detokenizer
from dycoke_core.engine.kv_cache import SequenceCache
from dycoke_core.preprocess import Prompt
from dycoke_core.sequence import Sequence


@dataclass(slots=True)
class StageClock:
    """Seconds of work per stage, and moments on the same monotonic clock."""

    added_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None
    first_token_at: float | None = None  # the first new one, behind a replay
    last_token_at: float | None = None
    vision_s: float = 0.0
    compress_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def note_token(self) -> None:
        self.last_token_at = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at


@dataclass(slots=True, eq=False)
class SequenceState:
    sequence: Sequence
    policy: Policy
    prompt: Prompt
    num_visual_tokens: int  # V
    detokenizer: Detokenizer
    clock: StageClock = field(default_factory=StageClock)
    # Set by the runner, in this order.
    features: Tensor | None = None  # [F, N, D], filled by micro-batches, dropped after stage I
    num_encoded_frames: int = 0
    kept_per_frame: tuple[int, ...] = ()
    embeds: Tensor | None = None  # [S, D], the prompt, dropped after prefill
    cache: SequenceCache | None = None
    chunk_ends: tuple[int, ...] = ()  # of the prompt

    @property
    def num_frames(self) -> int:
        return len(self.sequence.frames)

    @property
    def num_text_tokens(self) -> int:
        """Of the prompt, the newline included."""
        return len(self.prompt.ids_before_video) + 1 + len(self.prompt.ids_after_video)

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_text_tokens + self.num_visual_tokens

    @property
    def num_prefix_tokens(self) -> int:
        """The part of the prompt that every question about the video shares."""
        return len(self.prompt.ids_before_video) + self.num_visual_tokens + 1

    @property
    def num_forced(self) -> int:
        return len(self.sequence.forced_token_ids)
