"""Decides what a step does. Touches no tensor.

A step decodes every sequence that has its first token. In addition, under a budget of prompt
tokens, it works on the prompts of the others: chunks of prefixes and questions, and at most one
slice of the vision tower, so that a long prompt or video delays running answers by no more than
that. Work that several sequences share is done once.

Priority and age decide which sequence is admitted next, and whose prompt gets its piece first, so
that nothing starves (`dycoke_core.precedence`). What is left of a step's budget goes to others
whose piece fits, such as a question about a known video that waits after a long new one. Chunks are
never cut to fit the budget: their boundaries depend on the prompt alone.

A sequence without room may preempt low-priority ones (`dycoke_core.engine.preemption`). Otherwise
it waits, at most until all running sequences have ended, and no sequence of its priority or a lower
one passes it. If its turn came in spite of its low priority, sequences of higher priority that fit
beside it pass it: they take nothing that it will need once those that ran before have ended. Only
those that do not fit beside it are held up, for no longer than that and its own answer. Those that
pass may preempt as well.

When there is room again for a preempted sequence, its video may have to be encoded again and its
frames may be gone. Then it waits aside until they come, and all others pass it.
"""

from bisect import insort
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from dycoke_core.config import Priority
from dycoke_core.engine.preemption import Preemptible, choose_victims
from dycoke_core.precedence import RANKS, Precedence


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


class Schedulable(Preemptible, Protocol):
    """What the scheduler asks of a sequence; of its work, once it has been admitted."""

    arrival: int  # set by the scheduler
    has_come_in_turn: bool  # set by the scheduler: its turn came while higher priorities waited

    @property
    def prompt_work(self) -> PromptWork | None: ...

    @property
    def can_decode(self) -> bool: ...


State = TypeVar("State", bound=Schedulable)


class Admits(Protocol[State]):
    """Reserves what a sequence needs to run."""

    def admit(self, state: State) -> bool:
        """False: there is no room now, and it keeps its place."""
        ...

    def lacks_frames(self, state: State) -> bool:
        """Whether it cannot run until its frames have come again."""
        ...

    def fits(self, states: Sequence[State]) -> bool:
        """Whether the bytes for all of them would be there if nothing else ran. They may still not
        be in pieces that fit."""
        ...

    def keeping(self, state: State) -> AbstractContextManager[None]:
        """Protects what a sequence will share while others make room for it."""
        ...

    def preempt(self, state: State) -> State:
        """Gives back what a sequence reserved; returns what waits in its place."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk(Generic[State]):
    """The next tokens of a prefix or of a question."""

    state: State
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Preempted(Generic[State]):
    """What now waits in place of a preempted sequence, and the priority of the one that came."""

    state: State
    made_room_for: Priority


@dataclass(frozen=True, slots=True)
class Schedule(Generic[State]):
    """What one step does, and for which sequences. All `running` ones wait for it."""

    running: tuple[State, ...] = ()
    encode: tuple[State, ...] = ()  # all whose video waits for the tower, longest admitted first
    prefixes: tuple[Chunk[State], ...] = ()
    questions: tuple[Chunk[State], ...] = ()
    decode: tuple[State, ...] = ()  # each gets one token
    preempted: tuple[Preempted[State], ...] = ()


@dataclass(slots=True)
class Scheduler(Generic[State]):
    max_running: int
    max_prompt_tokens: int  # per step
    admission: Admits[State]
    # Bounded by the caller, which adds no more than it takes from its own queue.
    waiting: list[State] = field(default_factory=list)  # oldest first
    waiting_for_frames: list[State] = field(default_factory=list)  # steps skip these
    running: list[State] = field(default_factory=list)
    _admissions: Precedence = field(default_factory=Precedence)
    _prompts: Precedence = field(default_factory=Precedence)
    _passed: int = 0  # arrival of the last one that higher priorities were let past
    _passing: list[int] = field(default_factory=list)  # arrivals of those, while they run
    _num_arrived: int = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, state: State) -> None:
        self._num_arrived += 1
        state.arrival = self._num_arrived
        self.waiting.append(state)

    def remove(self, state: State) -> None:
        """Removes a sequence, wherever it is."""
        for states in (self.running, self.waiting, self.waiting_for_frames):
            if state in states:
                states.remove(state)

    def resume(self, state: State) -> None:
        """Returns a sequence whose frames have come to the place of its age."""
        self.waiting_for_frames.remove(state)
        self._wait(state)

    def schedule(self) -> Schedule[State]:
        preempted = self._admit_waiting()
        works = [(state, work) for state in self.running if (work := state.prompt_work)]
        chosen = self._choose_chunks(works)
        return Schedule(
            running=tuple(self.running),
            encode=tuple(state for state, work in works if work.kind is WorkKind.VISION),
            prefixes=tuple(chunk for kind, chunk in chosen if kind is WorkKind.PREFIX),
            questions=tuple(chunk for kind, chunk in chosen if kind is WorkKind.QUESTION),
            decode=tuple(state for state in self.running if state.can_decode),
            preempted=tuple(preempted),
        )

    def _admit_waiting(self) -> list[Preempted[State]]:
        """Returns the sequences that were preempted."""
        preempted: list[Preempted[State]] = []
        while self.waiting:
            state = self._admissions.ordered(self.waiting, lambda state: state.priority)[0]
            if self.admission.lacks_frames(state) and self._has_room(state, ()):
                self.waiting.remove(state)
                self.waiting_for_frames.append(state)
                continue
            is_best = not self._better_than(state)
            if not self._admit_making_room(state, preempted):
                self._let_pass(state, preempted)
                break
            is_oldest = not self.waiting or state.arrival < self.waiting[0].arrival
            self._admissions.note(is_oldest_served=is_oldest)
            state.has_come_in_turn = is_oldest and not is_best
        return preempted

    def _better_than(self, state: State) -> list[State]:
        """Waiting sequences of higher priority, in their own order."""
        rank = RANKS[state.priority]
        better = [each for each in self.waiting if RANKS[each.priority] < rank]
        return sorted(better, key=lambda each: RANKS[each.priority])

    def _let_pass(self, head: State, preempted: list[Preempted[State]]) -> None:
        """Admits those of better priority that fit beside the one whose turn has come: what it
        waits for is the end of others, whether they pass it or not. Adds those that made room."""
        if self._passed != head.arrival:
            self._passed, self._passing = head.arrival, []
        beside = [state for state in self.running if state.arrival in self._passing]
        self._passing = [state.arrival for state in beside]
        for state in self._better_than(head):
            beside.append(state)
            if len(beside) >= self.max_running or not self.admission.fits([head, *beside]):
                return
            if not self._admit_making_room(state, preempted):
                return
            self._passing.append(state.arrival)

    def _admit_making_room(self, state: State, preempted: list[Preempted[State]]) -> bool:
        """Admits a sequence, if need be in the place of others, which are added to those that made
        room."""
        if self._admit(state):
            return True
        victims = self._choose_victims(state)
        with self.admission.keeping(state):
            preempted += [self._preempt(each, state.priority) for each in victims]
            return bool(victims) and self._admit(state)

    def _admit(self, state: State) -> bool:
        if len(self.running) >= self.max_running or not self.admission.admit(state):
            return False
        self.waiting.remove(state)
        self.running.append(state)
        return True

    def _choose_victims(self, state: State) -> list[State]:
        return choose_victims(
            state.priority, self.running, lambda leaving: self._has_room(state, leaving)
        )

    def _has_room(self, state: State, leaving: Sequence[State]) -> bool:
        staying = [each for each in self.running if each not in leaving]
        return len(staying) < self.max_running and self.admission.fits([*staying, state])

    def _preempt(self, state: State, made_room_for: Priority) -> Preempted[State]:
        self.running.remove(state)
        resumed = self.admission.preempt(state)
        self._wait(resumed)
        return Preempted(resumed, made_room_for)

    def _wait(self, state: State) -> None:
        insort(self.waiting, state, key=lambda waiting: waiting.arrival)

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
