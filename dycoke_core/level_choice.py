"""The rule of policy `auto`: which level of a ladder a request is given.

Feedback and feed-forward control of the queue. A request gets the weakest level at which

1. the request's first token is predicted within its objective (what it has waited, the prompt work
   ahead of it, its own);
2. the requests waiting behind it would be in time too, if all of them got the same level (a fluid
   model of the queue, which keeps a fifth of the objective in reserve);
3. the engine keeps up with the requests that come: their rate of arrival times what one takes of
   the engine, the utilisation rho, stays below `MAX_UTILISATION`. A rate is an estimate, so this
   level rises only while work piles up.

Where no level is enough, it gets the strongest that it allows. To avoid flapping, compression eases
only once a stronger level has not been needed for one objective and, where load required it, rho is
below `EASED_UTILISATION`. So whatever the load, it eases at most once per objective.

A cached prefix costs only the question, so its level is used if it is weaker than needed, or the
next stronger one.

Knows no engine: the caller predicts. The clock is the caller's. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dycoke_core.auto import AutoConfig, Choice, Reason
from dycoke_core.config import CompressionConfig

MAX_UTILISATION = 0.9
EASED_UTILISATION = 0.75
QUIET_SHARE = 0.25  # of the objective: a line that is through by then is no sign of overload
LINE_SHARE = 0.8  # of the objective, within which the requests behind must be in time


@dataclass(frozen=True, slots=True)
class Level:
    """A rung of the ladder, for one sequence at one moment.

    Args:
        retained: share of the visual tokens that the language model sees, V / (F * N).
        is_cached: its prefix is there, or being prefilled.
        seconds: from now to the first token.
        mean_s: that a request of late takes of the engine at this level.
    """

    compression: CompressionConfig
    retained: float
    is_cached: bool
    seconds: float
    mean_s: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is not in the engine yet. Where several workers serve a queue, this one's share of it.

    Args:
        waited_s: how long each request behind this one has been queued, oldest first.
        arrivals_per_s: of requests, of late; 0: not known.
    """

    waited_s: tuple[float, ...] = ()
    arrivals_per_s: float = 0.0


NOTHING_WAITS = Outlook()


@dataclass(slots=True)
class Chooser:
    """Chooses levels for one engine. It remembers what was needed, so that levels do not flap."""

    _load: int = 0  # the level that load needs
    _held: int = 0  # the level that was needed last, until compression may ease
    _held_for_s: float = 0.0  # the objective that needed it
    _needed_at_s: float = 0.0

    def choose(
        self,
        config: AutoConfig,
        levels: Mapping[int, Level],
        outlook: Outlook = NOTHING_WAITS,
        *,
        waited_s: float = 0.0,
        now_s: float,
    ) -> Choice:
        """Args:
        levels: by their place in the ladder; those that the sequence fits in, at least one.
        waited_s: since the request was accepted.
        now_s: of a clock that never goes back.
        """
        retained = {place: level.retained for place, level in levels.items()}
        allowed = {place: levels[place] for place in allowed_places(retained, config.at_least)}
        present = levels.get(self._load, levels[min(levels)])
        quiet_s = QUIET_SHARE * config.objective_s
        is_quiet = waited_s + present.seconds <= quiet_s
        is_quiet = is_quiet and _is_line_in_time(present, outlook, quiet_s)
        self._note_load(levels, outlook.arrivals_per_s, is_quiet=is_quiet)
        needed, reason = self._needed(config.objective_s - waited_s, config, allowed, outlook)
        held = min(self._steady(needed, config.objective_s, now_s), max(allowed))
        place = min(place for place in allowed if place >= held)
        hits = [hit for hit in allowed if allowed[hit].is_cached and hit <= place + 1]
        if reason is not Reason.NONE_MEETS:
            if place > needed:
                reason = Reason.STEADY
            if hits and min(hits) != place:
                reason = Reason.CACHED
        place = min(hits, default=place)
        chosen = allowed[place]
        return Choice(place, chosen.compression, reason, waited_s + chosen.seconds)

    def _needed(
        self, left_s: float, config: AutoConfig, allowed: Mapping[int, Level], outlook: Outlook
    ) -> tuple[int, Reason]:
        """Args:
        left_s: of the objective.
        """
        meeting = sorted(place for place, level in allowed.items() if level.seconds <= left_s)
        if not meeting:
            return max(allowed), Reason.NONE_MEETS
        limit_s = LINE_SHARE * config.objective_s
        queue = (p for p in meeting if _is_line_in_time(allowed[p], outlook, limit_s))
        load = min((p for p in allowed if p >= self._load), default=max(allowed))
        needs = {
            Reason.OBJECTIVE: meeting[0],
            Reason.QUEUE: next(queue, max(allowed)),
            Reason.LOAD: load,
        }
        reason = max(needs, key=lambda reason: needs[reason])  # of equal ones the first
        return needs[reason], reason

    def _note_load(
        self, levels: Mapping[int, Level], arrivals_per_s: float, *, is_quiet: bool
    ) -> None:
        """Raises the load level once work has piled up. Lowers it only when a weaker level keeps up
        with room to spare, or when the current one is more than one level above what just keeps up.
        """
        eased = _least_below(EASED_UTILISATION, levels, arrivals_per_s)
        beyond = _least_below(1.0, levels, arrivals_per_s) + 1
        needed = _least_below(MAX_UTILISATION, levels, arrivals_per_s)
        limit = self._load if is_quiet else needed
        self._load = max(min(needed, limit), min(self._load, eased, beyond))

    def _steady(self, needed: int, objective_s: float, now_s: float) -> int:
        """Holds the last needed level for one objective. A request with a laxer objective than the
        one that set it is not held.
        """
        is_as_strict = objective_s <= self._held_for_s
        if needed < self._held and is_as_strict and now_s < self._needed_at_s + objective_s:
            return self._held
        if needed >= self._held or is_as_strict:
            self._held, self._held_for_s, self._needed_at_s = needed, objective_s, now_s
        return needed


def allowed_places(retained: Mapping[int, float], at_least: float) -> list[int]:
    """Places of the ladder that keep enough visual tokens; if none does, the first.

    Args:
        retained: share of the visual tokens, by place; at least one.
    """
    return [place for place in retained if retained[place] >= at_least] or [min(retained)]


def _is_line_in_time(level: Level, outlook: Outlook, limit_s: float) -> bool:
    """Whether all requests behind would be in time if they got this level too."""
    return all(
        waited_s + level.seconds + number * level.mean_s <= limit_s
        for number, waited_s in enumerate(outlook.waited_s, 1)
    )


def _least_below(utilisation: float, levels: Mapping[int, Level], arrivals_per_s: float) -> int:
    below = (p for p, level in levels.items() if arrivals_per_s * level.mean_s < utilisation)
    return min(below, default=max(levels))
