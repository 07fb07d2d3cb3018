"""Decides what a step does. Touches no tensor.

A step decodes every sequence that has its first token. Beside them, under a budget of prompt
tokens, it works on the prompts of the others, oldest first: chunks of prefixes and questions, and
at most one slice of the vision tower, so that a long prompt or video delays running answers by no
more than that. What several sequences share is worked on once.

The oldest gets its piece in every step, so nothing starves; what is left of the budget goes to
younger ones whose piece fits, such as a question about a known video behind a long new one. Chunks
are never cut to the budget: their boundaries depend on the prompt alone.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from dycoke_core.sequence import Sequence, Stage


@dataclass(frozen=True, slots=True)
class PromptWork:
    """The next thing that a sequence's prompt needs.

    Args:
        key: of the work; that of sequences which share a video or a prefix is the same.
        num_tokens: of the prompt; 0 for a slice of the vision tower.
    """

    key: str
    num_tokens: int

    @property
    def is_vision(self) -> bool:
        return self.num_tokens == 0


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    prompts: tuple[Sequence, ...]  # each gets its next piece of prompt work
    decode: tuple[Sequence, ...]  # each gets one token


@dataclass(slots=True)
class Scheduler:
    """
    Args:
        admit: reserves what a sequence needs to run; False: not now, it keeps its place.
        next_work: what a sequence's prompt needs next.
    """

    max_running: int
    max_prompt_tokens: int  # per step
    admit: Callable[[Sequence], bool]
    next_work: Callable[[Sequence], PromptWork]
    # Bounded by the caller, which adds no more than it takes from its own queue.
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> ScheduledStep:
        while self.waiting and len(self.running) < self.max_running and self.admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        decode = tuple(s for s in self.running if s.stage is Stage.DECODING)
        return ScheduledStep(self._schedule_prompts(), decode)

    def _schedule_prompts(self) -> tuple[Sequence, ...]:
        chosen: list[Sequence] = []
        keys: set[str] = set()  # looked up only: no order shows
        num_tokens, has_vision = 0, False
        for sequence in self.running:
            if sequence.stage is Stage.DECODING:
                continue
            work = self.next_work(sequence)
            if work.key in keys or (work.is_vision and has_vision):
                continue
            if num_tokens and num_tokens + work.num_tokens > self.max_prompt_tokens:
                continue
            chosen.append(sequence)
            keys.add(work.key)
            num_tokens += work.num_tokens
            has_vision = has_vision or work.is_vision
        return tuple(chosen)
