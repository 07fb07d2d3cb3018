"""The rule of policy `auto`: which level of a ladder a request gets.

It combines feedback and feed-forward control of the queue. A request gets the weakest level at
which

1. its own first token is predicted within its objective (the time that it has waited, the prompt
   work ahead of it, its own work);
2. the requests waiting after it would be in time too, if all of them got the same level (a fluid
   model of the queue, which keeps a fifth of the objective in reserve);
3. the engine keeps up with the arriving requests: the utilisation rho, which is their arrival rate
   times the engine time of one request, stays below `MAX_UTILISATION`. A rate is an estimate, so
   the load raises the level only while work piles up.

If no level is enough, the request gets the strongest that it allows. To avoid flapping, compression
eases only once a stronger level has not been needed for one objective and, where load required it,
rho is below `EASED_UTILISATION`. So under any load it eases at most once per objective. What counts
here is what recent requests need. A large request, one that waited before it was queued, or one
with another objective or priority gets the level that it needs itself, and does not keep others at
that level.

With a cached prefix only the question has to be computed, so the prefix's level is used if it is
weaker than needed, or the next stronger one. A prefix that is still being made counts only if it is
ready in time.

Knows no engine: the caller predicts, and supplies the clock. Standard library only.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from dycoke_core.auto import AutoConfig, Choice, Reason
from dycoke_core.config import DEFAULT_PRIORITY, CompressionConfig, Priority

MAX_UTILISATION = 0.9
EASED_UTILISATION = 0.75
RATE_SHARE = 0.5  # of the objective, over which arrivals have a rate
QUIET_SHARE = 0.25  # of the objective: a line that is served by then is no sign of overload
MAX_COURSES = 32  # objectives and priorities whose past is remembered
COURSES_PER_E = 10  # objectives within a tenth of each other share one
LINE_SHARE = 0.8  # of the objective, within which later requests must be in time


@dataclass(frozen=True, slots=True)
class Level:
    """A rung of the ladder, for one sequence at one moment.

    Args:
        retained: share of the visual tokens that the language model sees, V / (F * N).
        is_cached: its prefix is there, or being prefilled.
        seconds: from now to the first token.
    """

    compression: CompressionConfig
    retained: float
    is_cached: bool
    seconds: float

    def is_hit_by(self, seconds: float) -> bool:
        """Whether its prefix is there so soon that the first token comes by then."""
        return self.is_cached and self.seconds <= seconds


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is not in the engine yet. Where several workers serve a queue, this one's share of it.

    Args:
        waited_s: how long each request after this one has been queued, oldest first.
        arrivals_per_s: of requests, of late; 0: not known.
        last_arrivals_per_s: of the last few, which came within `last_s`.
    """

    waited_s: tuple[float, ...] = ()
    arrivals_per_s: float = 0.0
    last_arrivals_per_s: float = 0.0
    last_s: float = 0.0

    def rate(self, objective_s: float) -> float:
        """Of arrivals per second: that of the last few, where it is higher, as a burst shows in it
        first. Few that come within a short time are chance; as a burst, they are seen waiting.
        """
        is_long = self.last_s >= RATE_SHARE * objective_s
        return max(self.arrivals_per_s, self.last_arrivals_per_s if is_long else 0.0)


NOTHING_WAITS = Outlook()


@dataclass(frozen=True, slots=True)
class Situation:
    """What a choice meets, whatever the request is.

    Args:
        prompt_s: that the prompt of a request of late takes, at each level of the ladder.
        overhead_s: that a request takes of the engine beside its prompt.
        ahead_s: of prompt work in the engine.
        queued_s: how long this request has been queued, as others beside it.
    """

    prompt_s: tuple[float, ...]
    overhead_s: float = 0.0
    ahead_s: float = 0.0
    queued_s: float = 0.0
    outlook: Outlook = NOTHING_WAITS
    priority: Priority = DEFAULT_PRIORITY

    @property
    def places(self) -> range:
        return range(len(self.prompt_s))

    def cost_s(self, place: int) -> float:
        """What a request of late takes of the engine."""
        return self.prompt_s[place] + self.overhead_s

    def seconds(self, place: int) -> float:
        """To its first token, from now."""
        return self.ahead_s + self.prompt_s[place]

    def is_line_in_time(self, seconds: float, place: int, limit_s: float) -> bool:
        """Whether all requests after one that takes this long to its first token would be in time,
        if they got this level.
        """
        return all(
            waited_s + seconds + number * self.cost_s(place) <= limit_s
            for number, waited_s in enumerate(self.outlook.waited_s, 1)
        )

    def least_below(self, utilisation: float, rate: float) -> int:
        """The weakest level at which this many arrivals per second use less of the engine."""
        below = (place for place in self.places if rate * self.cost_s(place) < utilisation)
        return next(below, self.places[-1])


@dataclass(slots=True)
class Chooser:
    """Chooses levels for one engine. It remembers what was needed, so that levels do not flap."""

    # Of requests of about one objective, and one priority; used last ones last.
    _courses: "OrderedDict[tuple[int, Priority], _Course]" = field(default_factory=OrderedDict)

    def choose(
        self,
        config: AutoConfig,
        levels: Mapping[int, Level],
        situation: Situation,
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
        course = self._course(config.objective_s, situation.priority)
        held = course.level(situation, config.objective_s, now_s)
        needed, reason = _own_need(config, allowed, situation, course.load, waited_s)
        place = min((p for p in allowed if p >= max(needed, held)), default=max(allowed))
        latest_s = max(config.objective_s - waited_s, allowed[place].seconds)
        hits = [hit for hit in allowed if hit <= place + 1 and allowed[hit].is_hit_by(latest_s)]
        if reason is not Reason.NONE_MEETS:
            if place > needed:
                reason = Reason.STEADY
            if hits and min(hits) != place:
                reason = Reason.CACHED
        place = min(hits, default=place)
        chosen = allowed[place]
        return Choice(place, chosen.compression, reason, waited_s + chosen.seconds)

    def _course(self, objective_s: float, priority: Priority) -> "_Course":
        key = (round(COURSES_PER_E * math.log(objective_s)), priority)
        course = self._courses.setdefault(key, _Course())
        self._courses.move_to_end(key)
        if len(self._courses) > MAX_COURSES:
            self._courses.popitem(last=False)
        return course


@dataclass(slots=True)
class _Course:
    """What requests of about one objective, and one priority, have needed, as the situation
    changed."""

    load: int = 0  # the level that load needs
    _held: int = 0  # the level that was needed last, until compression may ease
    _needed_at_s: float = 0.0

    def level(self, situation: Situation, objective_s: float, now_s: float) -> int:
        """What a request of late needs, or needed within one objective."""
        self._note_load(situation, objective_s)
        needed = self._needed(situation, objective_s)
        if needed >= self._held or now_s >= self._needed_at_s + objective_s:
            self._held, self._needed_at_s = needed, now_s
        return self._held

    def _needed(self, situation: Situation, objective_s: float) -> int:
        limit_s = LINE_SHARE * objective_s
        enough = (
            place
            for place in situation.places[self.load :]
            if situation.queued_s + situation.seconds(place) <= objective_s
            and situation.is_line_in_time(situation.seconds(place), place, limit_s)
        )
        return next(enough, situation.places[-1])

    def _note_load(self, situation: Situation, objective_s: float) -> None:
        """Raises the load level once work has piled up. Lowers it only when a weaker level keeps up
        with room to spare, or when the current one is more than one level above what just keeps up.
        """
        quiet_s, rate = QUIET_SHARE * objective_s, situation.outlook.rate(objective_s)
        place = min(self.load, situation.places[-1])
        seconds = situation.seconds(place)
        is_quiet = situation.queued_s + seconds <= quiet_s
        is_quiet = is_quiet and situation.is_line_in_time(seconds, place, quiet_s)
        eased = situation.least_below(EASED_UTILISATION, rate)
        beyond = situation.least_below(1.0, rate) + 1
        needed = situation.least_below(MAX_UTILISATION, rate)
        limit = self.load if is_quiet else needed
        self.load = max(min(needed, limit), min(self.load, eased, beyond))


def _own_need(
    config: AutoConfig,
    allowed: Mapping[int, Level],
    situation: Situation,
    load: int,
    waited_s: float,
) -> tuple[int, Reason]:
    left_s = config.objective_s - waited_s
    meeting = sorted(place for place, level in allowed.items() if level.seconds <= left_s)
    if not meeting:
        return max(allowed), Reason.NONE_MEETS
    limit_s = LINE_SHARE * config.objective_s
    queue = (p for p in meeting if situation.is_line_in_time(allowed[p].seconds, p, limit_s))
    needs = {
        Reason.OBJECTIVE: meeting[0],
        Reason.QUEUE: next(queue, max(allowed)),
        Reason.LOAD: min((p for p in allowed if p >= load), default=max(allowed)),
    }
    reason = max(needs, key=lambda reason: needs[reason])  # of equal ones the first
    return needs[reason], reason


def allowed_places(retained: Mapping[int, float], at_least: float) -> list[int]:
    """Places of the ladder that keep enough visual tokens; if none does, the first.

    Args:
        retained: share of the visual tokens, by place; at least one.
    """
    return [place for place in retained if retained[place] >= at_least] or [min(retained)]
