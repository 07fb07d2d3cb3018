"""What one step computes, as integers: all that a backend needs to know about a step.

Prefixes and seats are named by the numbers that the backend gave them when they were opened.
A plan holds no tensor and knows no queue and no text.
"""

from dataclasses import dataclass

from dycoke_core.engine.sampler import Draw


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
