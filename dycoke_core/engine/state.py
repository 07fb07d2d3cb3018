"""What the engine knows of a sequence beyond the `Sequence` itself.

Everything that belongs to a sequence is here and nowhere else. To free it, release its prefix, its
seat and its bytes, and drop the state.

On a device that runs a step behind the host, more is launched than is known: `num_own_run` and
`num_chosen` count launched rows, `Sequence.output_token_ids` the tokens that have come back.
"""

import time
from dataclasses import dataclass, field, replace

from dycoke_core.compression.policies import Policy
from dycoke_core.config import Priority
from dycoke_core.engine.backend import DecodeRow, QuestionChunk, SeatLayout
from dycoke_core.engine.detokenizer import Detokenizer
from dycoke_core.engine.kept_recording import KeptRecording
from dycoke_core.engine.prefix_cache import Prefix
from dycoke_core.engine.sampler import Draw
from dycoke_core.engine.scheduler import PromptWork, WorkKind
from dycoke_core.engine.sight import chunk_end
from dycoke_core.model.adapter import PromptLayout
from dycoke_core.sequence import Sequence, Stage


@dataclass(slots=True)
class StageClock:
    """Seconds of work per stage, and moments on the same monotonic clock.

    A step's seconds count in full for every sequence that took part in it: they are what the
    sequence waited for, and shared work is in more than one sequence's sum.
    """

    added_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None
    first_token_at: float | None = None  # of the first new token, after a replay
    last_token_at: float | None = None
    vision_s: float = 0.0
    compress_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def note_start(self) -> None:
        """Records the first admission."""
        if self.started_at is None:
            self.started_at = time.perf_counter()

    def note_token(self) -> None:
        self.last_token_at = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at


@dataclass(slots=True, eq=False)
class SequenceState:
    sequence: Sequence
    policy: Policy
    prompt: PromptLayout
    layout: SeatLayout
    video_key: str
    prefix_key: str
    distinct_units: tuple[int, ...]  # units that differ from the one before
    unit_sources: tuple[int, ...]  # each unit's place among the distinct ones
    detokenizer: Detokenizer
    max_chunk_tokens: int
    forced_token_ids: tuple[int, ...]  # from an earlier attempt, or from before it was preempted
    clock: StageClock = field(default_factory=StageClock)
    kept_recording: KeptRecording | None = None  # if the client wants to know what was kept
    num_preemptions: int = 0
    # Set by the scheduler.
    arrival: int = 0
    has_come_in_turn: bool = False
    # Set at admission.
    prefix: Prefix | None = None
    seat: int | None = None
    reserved_bytes: int = 0  # of its seat
    has_video_hit: bool = False  # both: at the first one
    has_prefix_hit: bool = False
    # Advanced when a step is launched.
    num_own_run: int = 0  # tokens of its question and answer that the model has run
    num_chosen: int = 0  # tokens of its answer that are chosen, or being chosen
    # Advanced when a step is collected.
    num_refreshes: int = 0
    peak_device_bytes: int = 0  # held during its steps, except those since the last prompt work
    is_finished: bool = False

    # --- counts ---

    @property
    def has_video(self) -> bool:
        return self.prompt.num_units > 0

    @property
    def num_tokens_in(self) -> int:
        """F * N: the visual tokens before stage I."""
        return self.prompt.num_units * self.prompt.tokens_per_unit

    @property
    def num_visual_tokens(self) -> int:
        """V."""
        return self.layout.prefix.num_visual

    @property
    def retained_ratio(self) -> float:
        """V / (F * N): the share of a video's tokens that the language model sees."""
        return self.num_visual_tokens / self.num_tokens_in

    @property
    def num_prefix_tokens(self) -> int:
        """The prompt up to the question: what every question about the video shares. Without a
        video, one token: there is nothing worth sharing."""
        return self.layout.prefix.num_tokens

    @property
    def num_question_tokens(self) -> int:
        return len(self.prompt.question_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_question_tokens

    @property
    def num_text_tokens(self) -> int:
        """Text tokens of the prompt, with all that separates visual tokens."""
        return self.num_prompt_tokens - self.num_visual_tokens

    @property
    def num_forced(self) -> int:
        return len(self.forced_token_ids)

    @property
    def num_decode_steps(self) -> int:
        """Decode steps so far: each token but the last was run to choose the next."""
        return max(len(self.sequence.output_token_ids) - 1, 0)

    @property
    def held_prefix(self) -> Prefix:
        assert self.prefix is not None, "only admitted sequences hold a prefix"
        return self.prefix

    @property
    def held_seat(self) -> int:
        assert self.seat is not None, "only admitted sequences hold a seat"
        return self.seat

    # --- what to run next ---

    @property
    def priority(self) -> Priority:
        return self.sequence.priority

    @property
    def prompt_work(self) -> PromptWork | None:
        """What its prompt needs next: its video, its prefix or its question; None: nothing more.

        Chunks depend on the prompt and the setting alone, and end where the prefix ends. A unit
        whose tokens see each other goes in one, however long it is.
        """
        prefix = self.held_prefix
        if not prefix.is_embedded:
            return PromptWork(WorkKind.VISION, self.video_key, 0)
        if not prefix.is_ready:
            end = min(prefix.num_run + self.max_chunk_tokens, self.num_prefix_tokens)
            if self.prompt.sees_whole_units:
                runs = self.prompt.visual_runs(prefix.kept_per_unit)
                end = chunk_end(prefix.num_run, end, runs)
            return PromptWork(WorkKind.PREFIX, self.prefix_key, end - prefix.num_run)
        num_left = self.num_question_tokens - self.num_own_run
        if num_left <= 0:
            return None
        size = min(self.max_chunk_tokens, num_left)
        return PromptWork(WorkKind.QUESTION, self.sequence.sequence_id, size)

    @property
    def has_prompt_left(self) -> bool:
        """False: all of its prompt has been launched, what it shares included."""
        return self.num_own_run < self.num_question_tokens

    @property
    def can_decode(self) -> bool:
        """Whether there is a token, perhaps on its way, that another one may follow."""
        return 0 < self.num_chosen < self.sequence.sampling.max_tokens

    @property
    def has_work_left(self) -> bool:
        """False: all its tokens are on their way."""
        return self.prompt_work is not None or self.can_decode

    @property
    def num_tokens_at_stake(self) -> int:
        """Tokens encoded, prefilled or decoded for it alone, perhaps to be computed again."""
        prefix = self.held_prefix
        num_tokens = self.num_own_run
        if prefix.holders == 1:
            num_tokens += prefix.num_run
            if prefix.video is not None and prefix.video.holders == 1:
                num_tokens += prefix.video.num_encoded * self.prompt.tokens_per_unit
        return num_tokens

    def question_chunk(self, size: int) -> QuestionChunk:
        end = self.num_own_run + size
        return QuestionChunk(
            seat=self.held_seat,
            start=self.num_own_run,
            token_ids=self.prompt.question_ids[self.num_own_run : end],
            draw=self._draw(0) if end == self.num_question_tokens else None,
        )

    def decode_row(self) -> DecodeRow:
        index = self.num_chosen - 1  # of the input token in the answer
        known = self.sequence.output_token_ids
        forced = self.forced_token_ids
        token_id = known[index] if index < len(known) else None
        if index < len(forced):
            token_id = forced[index]
        return DecodeRow(
            self.held_seat,
            self.num_own_run,
            token_id,
            self._draw(self.num_chosen),
            wants_kept=self.kept_recording is not None,
        )

    def _draw(self, index: int) -> Draw | None:
        """How token `index` of the answer is chosen; None: it is already known."""
        if index < self.num_forced:
            return None
        return Draw.of_token(self.sequence.sampling, index)

    def note_launched(self, num_tokens: int) -> None:
        """Counts own tokens that are being run. The last of the question, and every one after it,
        chooses a token."""
        self.num_own_run += num_tokens
        if self.num_own_run >= self.num_question_tokens:
            self.num_chosen += 1

    def note_stage(self) -> None:
        """Shows stage and progress on the sequence."""
        sequence, prefix = self.sequence, self.held_prefix
        if sequence.output_token_ids:
            sequence.stage, sequence.progress = Stage.DECODING, 0.0
        elif prefix.is_embedded:
            sequence.stage = Stage.PREFILLING
            sequence.progress = (prefix.num_run + self.num_own_run) / self.num_prompt_tokens
        elif prefix.video is not None:
            sequence.stage = Stage.ENCODING
            sequence.progress = prefix.video.num_encoded / len(prefix.video.distinct)

    def resumed(
        self, detokenizer: Detokenizer, kept_recording: KeptRecording | None
    ) -> "SequenceState":
        """What waits in place of a preempted sequence: it runs what it has again, and continues
        from there. What is still on its way is chosen again, by the same draw."""
        sequence = self.sequence
        forced = max(self.forced_token_ids, tuple(sequence.output_token_ids), key=len)
        sequence.output_token_ids.clear()
        sequence.stage, sequence.progress = Stage.WAITING, 0.0
        return replace(
            self,
            detokenizer=detokenizer,
            kept_recording=kept_recording,
            forced_token_ids=forced,
            num_preemptions=self.num_preemptions + 1,
            prefix=None,
            seat=None,
            reserved_bytes=0,
            num_own_run=0,
            num_chosen=0,
            num_refreshes=0,
            is_finished=False,
        )
