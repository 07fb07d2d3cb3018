"""Decides what a step does. Touches no tensor.

A step decodes every sequence that has its first token. Beside them, under a budget of prompt
tokens, it works on the prompts of the others: chunks of prefixes and questions, and at most one
slice of the vision tower, so that a long prompt or video delays running answers by no more than
that. What several sequences share is worked on once.

Who is admitted next, and whose prompt gets its piece first, is decided by priority and age, so that
nothing starves (`dycoke_core.precedence`). What is left of a step's budget goes to others
whose piece fits, such as a question about a known video that waits after a long new one. Chunks are
never cut to the budget: their boundaries depend on the prompt alone.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from dycoke_core.config import Priority
from dycoke_core.precedence import Precedence


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
    """What the scheduler asks of a sequence; of its work, once it has been admitted."""

    @property
    def priority(self) -> Priority: ...

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
    _admissions: Precedence = field(default_factory=Precedence)
    _prompts: Precedence = field(default_factory=Precedence)

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
            state = self._admissions.ordered(self.waiting, lambda state: state.priority)[0]
            if not self.admission.admit(state):
                return
            self._admissions.note(is_oldest_served=state is self.waiting[0])
            self.waiting.remove(state)
            self.running.append(state)

    def _choose_chunks(
        self, works: list[tuple[State, PromptWork]]
    ) -> list[tuple[WorkKind, Chunk[State]]]:
        chunks = [(state, work) for state, work in works if work.kind is not WorkKind.VISION]
        chosen: list[tuple[WorkKind, Chunk[State]]] = []
        keys: set[str] = set()  # looked up only: no order shows
        num_tokens = 0
        for state, work in self._prompts.ordered(chunks, lambda chunk: chunk[0].priority):
            if work.key in keys:
                continue
            if num_tokens and num_tokens + work.num_tokens > self.max_prompt_tokens:
                continue
            chosen.append((work.kind, Chunk(state, work.num_tokens)))
            keys.add(work.key)
            num_tokens += work.num_tokens
        if chunks:
            self._prompts.note(is_oldest_served=chunks[0][1].key in keys)
        return chosen
