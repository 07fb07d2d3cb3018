"""Decides which sequences a step advances. Touches no tensor.

A step decodes every sequence that has its first token and works one slice (of the vision tower or
of the prompt) for the oldest that has not, so that a long prompt delays running answers by no more
than a slice. First come, first served; nothing overtakes.
"""

from collections import deque
from dataclasses import dataclass, field

from dycoke_core.sequence import Sequence, Stage


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    prefill: Sequence | None  # gets one slice of encoding or prefilling
    decode: tuple[Sequence, ...]  # get one token each


@dataclass(slots=True)
class Scheduler:
    """`waiting` is bounded by the caller, which adds no more than it took from its queue."""

    max_running: int
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
        while self.waiting and len(self.running) < self.max_running:
            self.running.append(self.waiting.popleft())
        decode = tuple(s for s in self.running if s.stage is Stage.DECODING)
        prefill = next((s for s in self.running if s.stage is not Stage.DECODING), None)
        return ScheduledStep(prefill, decode)
