"""Chooses a sequence's compression at the last moment before its video is encoded.

See `dycoke_core.level_choice` for the rule. This module supplies its inputs: the predicted first
token at each level, and what recent requests have cost the engine.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from dycoke_core.auto import AutoConfig, CachedChoice, Choice
from dycoke_core.config import PRIORITIES, CompressionConfig, Priority
from dycoke_core.engine.admission import Admission
from dycoke_core.engine.first_token import FirstTokenPredictor
from dycoke_core.engine.state import SequenceState
from dycoke_core.errors import InvalidRequestError
from dycoke_core.level_choice import (
    NOTHING_WAITS,
    Chooser,
    Level,
    Outlook,
    Situation,
    allowed_places,
)
from dycoke_core.rates import Work
from dycoke_core.sequence import Sequence

COMMITTED_SHARE = 1 / 8  # share of the objective that prompt work ahead of a choice may take
_NEWEST_SHARE = 1 / 20  # of the mean work of requests
_FORGET_S = 120.0  # after which an overhead that is not measured any more counts for a third


@dataclass(frozen=True, slots=True)
class _Asked:
    """A sequence that is to be chosen for, with its state by place in the ladder, where it fits."""

    sequence: Sequence
    config: AutoConfig
    states: dict[int, SequenceState]
    outlook: Outlook
    waited_s: float
    queued_s: float


class AutoCompression:
    def __init__(
        self,
        admission: Admission,
        predictor: FirstTokenPredictor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._admission = admission
        self._predictor = predictor
        self._clock = clock
        self._chooser = Chooser()
        self._overhead = _Overhead()
        self._ladder: tuple[CompressionConfig, ...] = ()
        self._mean: list[Work] = []  # of recent requests, at each level of the ladder

    def can_choose(self, config: AutoConfig, priority: Priority = PRIORITIES[-1]) -> bool:
        """Whether the engine has so little to do that it needs the next sequence. Until then a
        choice waits: the later it is made, the more it knows.
        """
        ahead_s = self._predictor.seconds(self._predictor.work_ahead(priority))
        return ahead_s <= COMMITTED_SHARE * config.objective_s

    def choose(
        self,
        sequence: Sequence,
        config: AutoConfig,
        outlook: Outlook = NOTHING_WAITS,
        *,
        waited_s: float,
        queued_s: float = 0.0,
    ) -> Choice:
        """Args:
        waited_s: since the request was accepted.
        queued_s: since it was queued, which may be later.

        Raises:
            InvalidRequestError, PromptTooLongError: as `Engine.add`, at a level that is allowed.
        """
        asked = self._asked(sequence, config, outlook, waited_s, queued_s)
        self._note_choice(asked)
        choice = self._choice(asked)
        self._note_chosen(asked, choice)
        return choice

    def choose_cached(
        self,
        sequence: Sequence,
        config: AutoConfig,
        outlook: Outlook = NOTHING_WAITS,
        *,
        waited_s: float,
        queued_s: float = 0.0,
    ) -> CachedChoice:
        """As `choose`, if that would choose a level whose prefix is there or on its way."""
        asked = self._asked(sequence, config, outlook, waited_s, queued_s)
        retained = {place: state.retained_ratio for place, state in asked.states.items()}
        prefix_keys = frozenset(
            asked.states[place].prefix_key for place in allowed_places(retained, config.at_least)
        )
        if not any(map(self._predictor.has_prefix, prefix_keys)):
            return CachedChoice(None, prefix_keys)
        choice = self._choice(asked)
        if not self._predictor.has_prefix(asked.states[choice.level].prefix_key):
            return CachedChoice(None, prefix_keys)
        self._note_choice(asked)
        self._note_chosen(asked, choice)
        return CachedChoice(choice, prefix_keys)

    def note_added(self, state: SequenceState) -> None:
        """Records the cost of a sequence whose compression was not chosen here. Does nothing until
        `auto` has been used.
        """
        if self._ladder and not state.sequence.is_weighed:
            self._overhead.note_prompt(self._predictor.seconds(self._predictor.own_work(state)))
            self._note(dict.fromkeys(range(len(self._ladder)), state))

    def _asked(
        self,
        sequence: Sequence,
        config: AutoConfig,
        outlook: Outlook,
        waited_s: float,
        queued_s: float,
    ) -> "_Asked":
        resolved = self._admission.resolve(sequence)
        states: dict[int, SequenceState] = {}
        refusal: InvalidRequestError | None = None
        for place, compression in enumerate(config.ladder):
            try:
                states[place] = self._admission.compressed(resolved, compression)
            except InvalidRequestError as error:
                refusal = error.with_traceback(None)  # which would hold the frames
        keep_enough = any(state.retained_ratio >= config.at_least for state in states.values())
        if refusal is not None and not keep_enough:
            raise refusal
        self._take_ladder(states, config.ladder)
        return _Asked(sequence, config, states, outlook, waited_s, queued_s)

    def _choice(self, asked: "_Asked") -> Choice:
        levels = {
            place: Level(
                asked.config.ladder[place],
                retained=state.retained_ratio,
                is_cached=self._predictor.has_prefix(state.prefix_key),
                seconds=self._predictor.seconds(
                    self._predictor.work_before(state) + self._predictor.own_work(state)
                ),
            )
            for place, state in asked.states.items()
        }
        return self._chooser.choose(
            asked.config,
            levels,
            self._situation(asked),
            waited_s=asked.waited_s,
            now_s=self._clock(),
        )

    def _situation(self, asked: "_Asked") -> Situation:
        priority = asked.sequence.priority
        return Situation(
            prompt_s=tuple(map(self._predictor.seconds, self._mean)),
            overhead_s=self._overhead.overhead_s,
            ahead_s=self._predictor.seconds(self._predictor.work_ahead(priority)),
            queued_s=asked.queued_s,
            outlook=asked.outlook,
            priority=priority,
        )

    def _note_choice(self, asked: "_Asked") -> None:
        """Counts a sequence once, however often it is chosen for. Chosen for again, it has not run
        since: that time tells nothing of what requests cost.
        """
        is_first = not asked.sequence.is_weighed
        self._overhead.note_choice(
            self._clock(),
            queued_s=asked.queued_s if is_first else 0.0,
            is_waited_for=bool(asked.outlook.waited_s),
        )
        if is_first:
            self._note(asked.states)

    def _note_chosen(self, asked: "_Asked", choice: Choice) -> None:
        own = self._predictor.own_work(asked.states[choice.level])
        self._overhead.note_prompt(self._predictor.seconds(own))
        asked.sequence.is_weighed = True

    def _take_ladder(
        self, states: dict[int, SequenceState], ladder: tuple[CompressionConfig, ...]
    ) -> None:
        if ladder != self._ladder:
            works = self._works(states)
            least = works[min(works)]
            self._ladder = ladder
            self._mean = [works.get(place, least) for place in range(len(ladder))]

    def _note(self, states: dict[int, SequenceState]) -> None:
        """Moves the means."""
        for place, work in self._works(states).items():
            self._mean[place] = self._mean[place].towards(work, _NEWEST_SHARE)

    def _works(self, states: dict[int, SequenceState]) -> dict[int, Work]:
        """What a request takes at each level. Were all requests given one level, a video whose
        prefix is there at any level would be there at that one.
        """
        works = {place: self._predictor.own_work(state) for place, state in states.items()}
        if any(self._predictor.has_prefix(state.prefix_key) for state in states.values()):
            works = dict.fromkeys(works, min(works.values(), key=lambda work: work.prompt_tokens))
        return works


class _Overhead:
    """What a request costs besides its prompt: decoding, full slots, whatever the rates miss. While
    requests wait, it is the time between two choices minus the prompts run in between. While none
    do, it is forgotten: those that come now may have shorter answers.
    """

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._chosen_at_s = 0.0
        self._is_waited_for = False  # the next request, since the last choice
        self._num_requests = 0  # since then
        self._prompts_s = 0.0  # that they take

    @property
    def overhead_s(self) -> float:
        return max(self._mean_s, 0.0)

    def note_choice(self, now_s: float, *, queued_s: float, is_waited_for: bool) -> None:
        """Args:
        queued_s: for how long this request has waited. What waited at the last choice may have left
            otherwise: the time since then counts only if this one waited all of it.
        is_waited_for: requests wait after this one.
        """
        since_s = now_s - self._chosen_at_s
        if self._is_waited_for and self._num_requests and queued_s >= since_s:
            overhead_s = (since_s - self._prompts_s) / self._num_requests
            share = min(self._num_requests * _NEWEST_SHARE, 1.0)
            self._mean_s += share * (overhead_s - self._mean_s)
        else:
            self._mean_s *= math.exp(-since_s / _FORGET_S)
        self._chosen_at_s, self._is_waited_for = now_s, is_waited_for
        self._num_requests, self._prompts_s = 0, 0.0

    def note_prompt(self, seconds: float) -> None:
        """Notes that the engine gets a request, and how long its prompt takes."""
        self._num_requests += 1
        self._prompts_s += seconds
