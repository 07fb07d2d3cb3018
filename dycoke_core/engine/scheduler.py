"""Decides what a step does. Touches no tensor.

A step decodes every sequence that has its first token. Beside them, under a budget of prompt
tokens, it works on the prompts of the others, oldest first: chunks of prefixes and questions, and
at most one slice of the vision tower, so that a long prompt or video delays running answers by no
more than that. What several sequences share is worked on once.

The oldest gets its piece in every step, so nothing starves; what is left of the budget goes to
younger ones whose piece fits, such as a question about a known video that waits after a long new
one. Chunks are never cut to the budget: their boundaries depend on the prompt alone.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, Protocol, TypeVar


class WorkKind(StrEnum):
    VISION = "vision"
    PREFIX = "prefix"
    QUESTION = "question"


@dataclass(frozen=True, slots=True)
class PromptWork:
    """The next thing that a sequence's prompt needs.

    Args:
        key: identifies the work; sequences that share a video or a prefix share a key.
        num_tokens: of the prompt; 0 for a slice of the vision tower.
    """

    kind: WorkKind
    key: str
    num_tokens: int


class Schedulable(Protocol):
    """What the scheduler asks of a sequence that has been admitted."""

    @property
    def prompt_work(self) -> PromptWork | None: ...

    @property
    def can_decode(self) -> bool: ...


State = TypeVar("State", bound=Schedulable)
State_contra = TypeVar("State_contra", bound=Schedulable, contravariant=True)


class Admits(Protocol[State_contra]):
    """Reserves what a sequence needs to run."""

    def admit(self, state: State_contra) -> bool:
        """False: not now, it keeps its place."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk(Generic[State]):
    """The next tokens of a prefix or of a question."""

    state: State
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Schedule(Generic[State]):
    """What one step does, and for whom. `running` are all that wait for it."""

    running: tuple[State, ...] = ()
    encode: tuple[State, ...] = ()  # all whose video waits for the tower, oldest first
    prefixes: tuple[Chunk[State], ...] = ()
    questions: tuple[Chunk[State], ...] = ()
    decode: tuple[State, ...] = ()  # each gets one token


@dataclass(slots=True)
class Scheduler(Generic[State]):
    max_running: int
    max_prompt_tokens: int  # per step
    admission: Admits[State]
    # Bounded by the caller, which adds no more than it takes from its own queue.
    waiting: deque[State] = field(default_factory=deque)
    running: list[State] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, state: State) -> None:
        self.waiting.append(state)

    def remove(self, state: State) -> None:
        """Takes a sequence out, wherever it is."""
        if state in self.running:
            self.running.remove(state)
        else:
            self.waiting.remove(state)

    def schedule(self) -> Schedule[State]:
        self._admit_waiting()
        works = [(state, work) for state in self.running if (work := state.prompt_work)]
        chosen = self._choose_chunks(works)
        return Schedule(
            running=tuple(self.running),
            encode=tuple(state for state, work in works if work.kind is WorkKind.VISION),
            prefixes=tuple(chunk for kind, chunk in chosen if kind is WorkKind.PREFIX),
            questions=tuple(chunk for kind, chunk in chosen if kind is WorkKind.QUESTION),
            decode=tuple(state for state in self.running if state.can_decode),
        )

    def _admit_waiting(self) -> None:
        while self.waiting and len(self.running) < self.max_running:
            if not self.admission.admit(self.waiting[0]):
                return
            self.running.append(self.waiting.popleft())

    def _choose_chunks(
        self, works: list[tuple[State, PromptWork]]
    ) -> list[tuple[WorkKind, Chunk[State]]]:
        chosen: list[tuple[WorkKind, Chunk[State]]] = []
        keys: set[str] = set()  # looked up only: no order shows
        num_tokens = 0
        for state, work in works:
            if work.kind is WorkKind.VISION or work.key in keys:
                continue
            if num_tokens and num_tokens + work.num_tokens > self.max_prompt_tokens:
                continue
            chosen.append((work.kind, Chunk(state, work.num_tokens)))
            keys.add(work.key)
            num_tokens += work.num_tokens
        return chosen
