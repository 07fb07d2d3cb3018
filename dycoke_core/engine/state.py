"""What the engine knows of a sequence beyond the `Sequence` itself.

Everything that belongs to a sequence hangs here and nowhere else; releasing its prefix and its
bytes and dropping the state frees it.
"""

import time
from dataclasses import dataclass, field

from dycoke_core.compression.policies import Policy
from dycoke_core.engine.detokenizer import Detokenizer
from dycoke_core.engine.kv_cache import SequenceKV
from dycoke_core.engine.prefix_cache import Prefix
from dycoke_core.preprocess import Prompt
from dycoke_core.sequence import Sequence, Stage


@dataclass(slots=True)
class StageClock:
    """Seconds of work per stage, and moments on the same monotonic clock.

    A step's seconds count in full for every sequence that took part in it: they are what the
    sequence waited for, and shared work is in more than one sequence's sum.
    """

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
    video_key: str
    prefix_key: str
    distinct_frames: tuple[int, ...]  # those that differ from the frame before
    frame_sources: tuple[int, ...]  # for each frame, its place among the distinct ones
    detokenizer: Detokenizer
    clock: StageClock = field(default_factory=StageClock)
    # Set at admission.
    prefix: Prefix | None = None
    reserved_bytes: int = 0  # of its own rows
    has_video_hit: bool = False
    has_prefix_hit: bool = False
    # Set when its question is prefilled.
    kv: SequenceKV | None = None
    peak_device_bytes: int = 0  # allocated on a GPU during its steps, but for the one under way

    @property
    def num_frames(self) -> int:
        return len(self.sequence.frames)

    @property
    def num_prefix_tokens(self) -> int:
        """Text before the video, visual tokens, newline: what every question about it shares."""
        return len(self.prompt.ids_before_video) + self.num_visual_tokens + 1

    @property
    def num_question_tokens(self) -> int:
        """Of the prompt behind the newline."""
        return len(self.prompt.ids_after_video)

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_question_tokens

    @property
    def num_text_tokens(self) -> int:
        """Of the prompt, the newline included."""
        return self.num_prompt_tokens - self.num_visual_tokens

    @property
    def max_own_tokens(self) -> int:
        """Room that its question and its longest answer take."""
        return self.num_question_tokens + self.sequence.sampling.max_tokens

    @property
    def num_forced(self) -> int:
        return len(self.sequence.forced_token_ids)

    @property
    def is_replaying(self) -> bool:
        """Whether its next token is one that an earlier attempt has published."""
        return len(self.sequence.output_token_ids) < len(self.sequence.forced_token_ids)

    @property
    def held_prefix(self) -> Prefix:
        assert self.prefix is not None, "only admitted sequences hold a prefix"
        return self.prefix

    @property
    def finished_kv(self) -> SequenceKV:
        assert self.kv is not None, "only sequences that have answered have a report"
        return self.kv

    @property
    def num_own_tokens_seen(self) -> int:
        """Tokens of its question and answer that the model has seen."""
        return 0 if self.kv is None else self.kv.num_own_tokens

    @property
    def num_question_left(self) -> int:
        return self.num_question_tokens - self.num_own_tokens_seen

    def note_stage(self) -> None:
        """Shows stage and progress on the sequence."""
        sequence, prefix = self.sequence, self.held_prefix
        if sequence.output_token_ids:
            sequence.stage, sequence.progress = Stage.DECODING, 0.0
        elif prefix.kv is not None:
            num_seen = prefix.kv.num_tokens + self.num_own_tokens_seen
            sequence.stage = Stage.PREFILLING
            sequence.progress = num_seen / self.num_prompt_tokens
        elif prefix.video is not None:
            sequence.stage = Stage.ENCODING
            sequence.progress = prefix.video.num_encoded / len(prefix.video.distinct)
