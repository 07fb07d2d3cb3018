"""Chooses a sequence's compression at the last moment before its video is encoded.

See `dycoke_core.level_choice` for the rule. Here is what it goes by: when the first token would
come at each level, and what the requests of late have taken of the engine.
"""

import time

from dycoke_core.auto import AutoConfig, Choice
from dycoke_core.config import CompressionConfig
from dycoke_core.engine.admission import Admission
from dycoke_core.engine.first_token import FirstTokenPredictor
from dycoke_core.engine.state import SequenceState
from dycoke_core.errors import InvalidRequestError, PromptTooLongError
from dycoke_core.level_choice import NOTHING_WAITS, Chooser, Level, Outlook
from dycoke_core.rates import Work
from dycoke_core.sequence import Sequence

COMMITTED_SHARE = 1 / 8  # of the objective: prompt work ahead of a choice, which it cannot change
_NEWEST_SHARE = 1 / 20  # of the mean work of requests


class AutoCompression:
    def __init__(self, admission: Admission, predictor: FirstTokenPredictor) -> None:
        self._admission = admission
        self._predictor = predictor
        self._chooser = Chooser()
        self._ladder: tuple[CompressionConfig, ...] = ()
        self._mean: list[Work] = []  # of the requests of late, at each level of the ladder
        self._chosen_id: str | None = None  # of the sequence that was chosen for last

    def can_choose(self, config: AutoConfig) -> bool:
        """Whether the engine has so little to do that it needs the next sequence. Until then a
        choice waits: the later it is made, the more it knows.
        """
        ahead_s = self._predictor.seconds(self._predictor.work_ahead())
        return ahead_s <= COMMITTED_SHARE * config.objective_s

    def choose(
        self,
        sequence: Sequence,
        config: AutoConfig,
        outlook: Outlook = NOTHING_WAITS,
        *,
        waited_s: float,
    ) -> Choice:
        """Args:
        waited_s: since the request was accepted.

        Raises:
            InvalidRequestError, PromptTooLongError: as `Engine.add`, at a level that is allowed.
        """
        states = self._states(sequence, config)
        self._note(states, config.ladder)
        self._chosen_id = sequence.sequence_id
        ahead = self._predictor.work_ahead()
        levels = {
            place: Level(
                config.ladder[place],
                retained=state.num_visual_tokens / state.num_tokens_in,
                is_cached=self._predictor.has_prefix(state),
                seconds=self._predictor.seconds(ahead + self._predictor.own_work(state)),
                mean_s=self._predictor.seconds(self._mean[place]),
            )
            for place, state in states.items()
        }
        return self._chooser.choose(
            config, levels, outlook, waited_s=waited_s, now_s=time.monotonic()
        )

    def note_added(self, state: SequenceState) -> None:
        """Takes in what a sequence whose compression was not chosen here adds at any level."""
        if state.sequence.sequence_id != self._chosen_id:
            self._note(dict.fromkeys(range(len(self._ladder)), state), self._ladder)

    def _states(self, sequence: Sequence, config: AutoConfig) -> dict[int, SequenceState]:
        """By place in the ladder, where the sequence fits."""
        resolved = self._admission.resolve(sequence)
        states: dict[int, SequenceState] = {}
        for place, compression in enumerate(config.ladder):
            try:
                states[place] = self._admission.compressed(resolved, compression)
            except (InvalidRequestError, PromptTooLongError):
                if place + 1 == len(config.ladder) and not states:
                    raise
        return states

    def _note(
        self, states: dict[int, SequenceState], ladder: tuple[CompressionConfig, ...]
    ) -> None:
        """Moves the means. Were all requests given one level, a video whose prefix is there at any
        level would be there at that one.
        """
        works = {place: self._predictor.own_work(state) for place, state in states.items()}
        if not works:
            return
        if any(map(self._predictor.has_prefix, states.values())):
            works = dict.fromkeys(works, min(works.values(), key=lambda work: work.prompt_tokens))
        if ladder != self._ladder:
            self._ladder = ladder
            least = works[min(works)]
            self._mean = [works.get(place, least) for place in range(len(ladder))]
        for place, work in works.items():
            self._mean[place] = self._mean[place].towards(work, _NEWEST_SHARE)
