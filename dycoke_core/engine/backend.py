"""The interface between the engine and a device: a backend holds keys and values, and runs steps.

The engine decides what a step does (`StepPlan`); a backend does it and reports the chosen tokens
(`StepOutcome`). A backend owns every tensor of the KV cache and of stage II; the engine holds the
numbers of prefixes and seats. A backend knows no sequence, no text and no queue.

    open_prefix ── embed_prefix ── run … run ── finish_prefix ────────────── close_prefix
                                     open_seat ── run … run ── close_seat

A *prefix* is the prompt up to the question, shared by all questions about a video. A *seat* is
what one running sequence owns in addition to a prefix: the keys and values of its question and
answer, and its stage-II state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dycoke_core.compression.kv_pruning import StageTwo
from dycoke_core.engine.sampler import Draw
from dycoke_core.model.adapter import EmbeddedPrefix

KeptPlaces = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class PrefixLayout:
    """The tokens of a prefix, by number. Which of them are visual comes with its embeddings.

    Args:
        next_position: of the first token after it; not always the number of its tokens.
        first_host_layer: from this layer on, a finished prefix may lie in host memory; the number
            of layers: it stays on the device whole.
    """

    num_tokens: int
    num_visual: int
    next_position: int
    first_host_layer: int

    @property
    def num_text(self) -> int:
        return self.num_tokens - self.num_visual


@dataclass(frozen=True, slots=True)
class SeatLayout:
    """What a seat has to hold.

    Args:
        max_own_tokens: room for the question and the longest answer.
        stage_two: None where stage II is off.
    """

    prefix: PrefixLayout
    max_own_tokens: int
    stage_two: StageTwo | None

    @property
    def num_front(self) -> int:
        """Tokens before the question that a pruned layer attends to: kept ones and text."""
        return 0 if self.stage_two is None else self.stage_two.num_kept + self.prefix.num_text


@dataclass(frozen=True, slots=True)
class PrefixChunk:
    """The next rows of a prompt prefix that is being prefilled."""

    prefix: int
    start: int  # rows of the prefix already run
    size: int


@dataclass(frozen=True, slots=True)
class QuestionChunk:
    """The next tokens of a question, after its prefix.

    draw: for the token that follows its last one; None where more of the question is to come, or
        where that token is known already.
    """

    seat: int
    start: int  # own tokens already run
    token_ids: tuple[int, ...]
    draw: Draw | None


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One decode step of one sequence.

    token_id: the input token; None: the token that the seat's last row drew, which may not have
        left the device yet.
    draw: for the token that follows; None in a replay, where it is known.
    wants_kept: its outcome says which visual tokens stage II kept.
    """

    seat: int
    start: int  # own tokens already run
    token_id: int | None
    draw: Draw | None
    wants_kept: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, as integers: all that a backend needs to know about a step.

    Prefixes and seats are named by the numbers that the backend gave them when they were opened. A
    plan holds no tensor and knows no queue and no text.
    """

    prefixes: tuple[PrefixChunk, ...] = ()
    questions: tuple[QuestionChunk, ...] = ()
    decode: tuple[DecodeRow, ...] = ()

    @property
    def answering(self) -> tuple[QuestionChunk | DecodeRow, ...]:
        """The rows that may choose a token, in the order of a `StepOutcome`."""
        return (*self.questions, *self.decode)

    @property
    def draws(self) -> tuple[Draw, ...]:
        """Of the rows that do, in the same order."""
        return tuple(row.draw for row in self.answering if row.draw is not None)

    def __bool__(self) -> bool:
        return bool(self.prefixes or self.questions or self.decode)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step chose, one entry for each of `StepPlan.answering`.

    Args:
        token_ids: None where nothing was drawn.
        is_finite: False where the logits were not finite; the token means nothing then.
        refreshes: of each seat so far; 0 for a question's chunk.
        kept: [n_keep], ascending places among the V visual tokens that stage II kept in this step;
            None of a row that does not want them, and where stage II is off. Empty: no row does.
    """

    token_ids: tuple[int | None, ...]
    is_finite: tuple[bool, ...]
    refreshes: tuple[int, ...]
    kept: tuple[KeptPlaces | None, ...] = ()


class Pending(Protocol):
    """A step that was launched; its outcome may still be on the device."""

    @property
    def logits(self) -> Tensor:
        """float32 [draws, vocabulary], until the next step is launched. For tests."""
        ...


@dataclass(frozen=True, slots=True)
class SeatView:
    """A seat's stage-II state, for tests and the laboratory: fetching it waits for the device."""

    kept: Tensor | None  # int64 [n_keep], ascending places among the V visual tokens
    num_refreshes: int


class Mark(Protocol):
    """A point in the device's work."""


class Backend(Protocol):
    """
    Args:
        depth: launched steps whose outcome may be outstanding while the next one is planned.
        kv_budget_bytes: what prefixes and seats may reserve together.
        host_budget_bytes: what finished prefixes may take of the host's memory.
        vision_slice_layers: layers of the vision tower that run between two decode steps; None: as
            many as fill a time slice.
    """

    depth: int
    kv_budget_bytes: int
    host_budget_bytes: int
    vision_slice_layers: int | None

    # --- memory ---

    def prefix_bytes(self, layout: PrefixLayout) -> int:
        """Device bytes of a prefix while it is prefilled, as they are allocated."""
        ...

    def host_bytes(self, layout: PrefixLayout) -> int:
        """Host bytes that `finish_prefix` moves it to; 0: it stays on the device."""
        ...

    def moved_bytes(self, layout: PrefixLayout) -> int:
        """Device bytes that `finish_prefix` gives back when it moves layers to the host."""
        ...

    def seat_bytes(self, layout: SeatLayout) -> int:
        """Device bytes of a seat, as they are allocated."""
        ...

    def allocated_bytes(self) -> int:
        """Bytes of keys and values on the device, of all open prefixes and seats."""
        ...

    def memory_in_use(self) -> int:
        """Bytes allocated on a GPU now; 0 on a CPU."""
        ...

    def peak_memory(self) -> int:
        """The most bytes held since `reset_peak_memory`; on a CPU the process's peak RSS."""
        ...

    def reset_peak_memory(self) -> None: ...

    def release_idle_memory(self) -> None:
        """Gives back what the device's allocator holds in reserve, after an allocation failed."""
        ...

    def check(self, *, num_prefixes: int) -> None:
        """Raises AssertionError: with no seat and this many prefixes open, more is held, or held
        twice."""
        ...

    # --- prefixes and seats ---

    def open_prefix(self, layout: PrefixLayout) -> int | None:
        """Reserves a prefix; None: its bytes are free, but not in pieces that fit."""
        ...

    def embed_prefix(self, prefix: int, embedded: EmbeddedPrefix) -> None:
        """Passes in the embeddings that the prefix's chunks will run."""
        ...

    def finish_prefix(self, prefix: int, *, to_host: bool) -> None:
        """Frees what only prefilling needed, once all chunks have been launched.

        Args:
            to_host: moves the layers from `first_host_layer` on to host memory.

        Raises:
            Exception: an allocation failed; the prefix is whole, where it was.
        """
        ...

    def close_prefix(self, prefix: int) -> None: ...

    def open_seat(self, prefix: int, layout: SeatLayout) -> int | None:
        """Reserves a seat over a prefix; None as for `open_prefix`."""
        ...

    def close_seat(self, seat: int) -> None: ...

    def view(self, seat: int) -> SeatView: ...

    # --- steps ---

    def run(self, plan: StepPlan) -> Pending:
        """Launches a step.

        Raises:
            Exception: whatever it was; caches and selections are as before.
        """
        ...

    def collect(self, pending: Pending) -> StepOutcome:
        """Waits for a step's outcome. Steps are collected in the order in which they ran."""
        ...

    def stage_frames(self, frames: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """[height, width, 3] each, of one size, perhaps read-only → a copy [len(frames), height,
        width, 3] on the device."""
        ...

    def mark(self) -> Mark:
        """Marks the end of all work launched so far."""
        ...

    def has_passed(self, mark: Mark) -> bool:
        """Whether the device has reached a mark; does not wait."""
        ...

    def seconds(self, start: Mark, end: Mark) -> float:
        """Seconds between two marks; waits until the device has reached the later one."""
        ...
