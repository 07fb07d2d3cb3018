"""Figures of a comparison: goodput, accuracy, times and levels, by phase and for the whole.

Every setting got the same arrivals, so differences are taken arrival by arrival. What happens to
neighbours in time is not independent (a backlog makes all of them late), so intervals come from
resampling stretches of time, not arrivals; they do not cover how machines differ.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.accuracy.claims import verdict_on
from loadtest.accuracy.statistics import Estimate, Floats, Ints, Paired, exact_difference
from loadtest.auto.profile import Phase
from loadtest.auto.run import Choice, Outcome
from loadtest.runs import Spread

AUTO = "auto"
FULL = "full"
BLOCKS_PER_PHASE = 4  # stretches that are resampled
ACCURACY_MARGIN = 0.01  # that `auto` may lose at low load
WHOLE = "whole profile"
LOW_LOAD = "all of low load"
GOODPUT, ACCURACY = "goodput", "accuracy"

Turns = Sequence[Mapping[str, Sequence[Outcome]]]  # of each turn, by setting: the same arrivals


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one setting in one phase, all turns together.

    Args:
        phase: its name, or `WHOLE`.
        good: share of the arrivals whose first token came within the objective and whose answer
            was right (or was not judged).
        goodput_per_s: such answers.
        accuracy: share of the answers that were right; None: none came, or none was judged.
        ttft_s: of those that got a first token.
        levels: share of the answers, by compression.
    """

    phase: str
    setting: str
    num_asked: int
    num_refused: int
    num_failed: int
    good: Estimate
    goodput_per_s: float
    accuracy: float | None
    ttft_s: Spread | None
    levels: dict[str, float]


@dataclass(frozen=True, slots=True)
class ByReason:
    """Choices of `auto` for one reason.

    Args:
        in_time: share whose first token came within the objective, by the service's clock.
        error_s: time to first token less the predicted one, by the service's clock.
    """

    reason: str
    num_choices: int
    in_time: float
    error_s: Spread | None


@dataclass(frozen=True, slots=True)
class Claim:
    """What `auto` is to show, as a difference of shares.

    Args:
        measure: `GOODPUT` or `ACCURACY`.
        verdict: as `loadtest.accuracy.claims.verdict_on`; "no difference shown" where an interval
            around 0 is enough.
    """

    measure: str
    text: str
    phase: str
    difference: Estimate
    verdict: str


class Comparison:
    """Args:
    phase_s: how long each phase was.
    """

    def __init__(
        self, turns: Turns, phases: Sequence[Phase], *, phase_s: float, objective_s: float
    ) -> None:
        self.phases = phases
        self.phase_s = phase_s
        self.objective_s = objective_s
        self.num_turns = len(turns)
        self.settings = tuple(turns[0])
        self.outcomes = {
            setting: [outcome for turn in turns for outcome in turn[setting]]
            for setting in self.settings
        }
        arrivals = [outcome.arrival for outcome in self.outcomes[self.settings[0]]]
        turn_of = [place for place, turn in enumerate(turns) for _ in turn[self.settings[0]]]
        self._phases = np.array([arrival.phase for arrival in arrivals])
        num_blocks = BLOCKS_PER_PHASE * len(phases)  # of a turn
        self._blocks = np.array(
            [
                turn * num_blocks + int(arrival.at_s / phase_s * BLOCKS_PER_PHASE)
                for turn, arrival in zip(turn_of, arrivals, strict=True)
            ]
        )

    def is_good(self, outcome: Outcome) -> bool:
        in_time = outcome.ttft_s is not None and outcome.ttft_s <= self.objective_s
        return in_time and outcome.is_answered and outcome.is_right is not False

    def figures(self) -> list[Figures]:
        """Of every phase that had arrivals, then the whole; settings in their order."""
        return [
            self._figures(place, setting)
            for place in (*self._phases_seen(), None)
            for setting in self.settings
        ]

    def by_reason(self) -> list[ByReason]:
        """The most frequent reason first; empty where `auto` was left out."""
        choices = [o.choice for o in self.outcomes.get(AUTO, []) if o.choice is not None]
        return [
            self._by_reason(reason, [choice for choice in choices if choice.reason == reason])
            for reason, _ in Counter(choice.reason for choice in choices).most_common()
        ]

    def claims(self) -> list[Claim]:
        """What the comparison is for; empty where `auto` or a fixed setting was left out."""
        fixed = [setting for setting in self.settings if setting != AUTO]
        if AUTO not in self.settings or not fixed:
            return []
        claims = self._accuracy_claim() if FULL in fixed else []
        for place in self._phases_seen():
            best = max(fixed, key=lambda setting: self._good(setting, place).mean())
            difference = self._difference(self._good(AUTO, place), self._good(best, place), place)
            verdict = "no difference shown" if _has_zero(difference) else verdict_on(difference, 0)
            text = f"auto is not below the best fixed setting, {best}"
            claims.append(Claim(GOODPUT, text, self.phases[place].name, difference, verdict))
        for setting in fixed:
            difference = self._difference(self._good(AUTO), self._good(setting))
            verdict = verdict_on(difference, 0)
            claims.append(Claim(GOODPUT, f"auto is above {setting}", WHOLE, difference, verdict))
        return claims

    def _by_reason(self, reason: str, choices: Sequence[Choice]) -> ByReason:
        in_time = sum(choice.ttft_s <= self.objective_s for choice in choices) / len(choices)
        errors_s = [choice.ttft_s - choice.predicted_ttft_s for choice in choices]
        return ByReason(reason, len(choices), in_time, Spread.of(errors_s))

    def _accuracy_claim(self) -> list[Claim]:
        """On the answers that both gave at low load."""
        pairs = [
            (auto.is_right, full.is_right)
            for auto, full in zip(self.outcomes[AUTO], self.outcomes[FULL], strict=True)
            if self.phases[auto.arrival.phase].is_low and None not in (auto.is_right, full.is_right)
        ]
        if not pairs:
            return []
        ours, theirs = np.array(pairs, float).T
        difference = exact_difference(ours, theirs)
        text = f"auto is within {ACCURACY_MARGIN:g} of full tokens ({len(pairs)} answers)"
        verdict = verdict_on(difference, -ACCURACY_MARGIN)
        return [Claim(ACCURACY, text, LOW_LOAD, difference, verdict)]

    def _figures(self, place: int | None, setting: str) -> Figures:
        outcomes = [
            outcome
            for outcome in self.outcomes[setting]
            if place is None or outcome.arrival.phase == place
        ]
        answered = [outcome for outcome in outcomes if outcome.is_answered]
        judged = [outcome.is_right for outcome in answered if outcome.is_right is not None]
        good = self._good(setting, place)
        seconds = self.num_turns * self.phase_s * (len(self.phases) if place is None else 1)
        counts = Counter(outcome.compression or "" for outcome in answered)
        return Figures(
            phase=WHOLE if place is None else self.phases[place].name,
            setting=setting,
            num_asked=len(outcomes),
            num_refused=sum(outcome.refused is not None for outcome in outcomes),
            num_failed=sum(outcome.failure is not None for outcome in outcomes),
            good=_paired(self._blocks_of(place)).mean(good, (0,)),
            goodput_per_s=float(good.sum()) / seconds,
            accuracy=sum(judged) / len(judged) if judged else None,
            ttft_s=Spread.of([o.ttft_s for o in outcomes if o.ttft_s is not None]),
            levels={name: count / len(answered) for name, count in sorted(counts.items())},
        )

    def _good(self, setting: str, place: int | None = None) -> Floats:
        """float64 [arrivals of the phase], 0 or 1."""
        good = np.array([self.is_good(outcome) for outcome in self.outcomes[setting]], float)
        return good if place is None else good[self._phases == place]

    def _blocks_of(self, place: int | None) -> Ints:
        return self._blocks if place is None else self._blocks[self._phases == place]

    def _difference(self, ours: Floats, theirs: Floats, place: int | None = None) -> Estimate:
        return _paired(self._blocks_of(place)).difference(ours, theirs, (0,))

    def _phases_seen(self) -> list[int]:
        return [int(place) for place in np.unique(self._phases)]


def _paired(blocks: Ints) -> Paired:
    """All questions are of one family, so that every arrival weighs the same."""
    return Paired(blocks, np.zeros(len(blocks), np.int64), 1)


def _has_zero(difference: Estimate) -> bool:
    return difference.low <= 0 <= difference.high
