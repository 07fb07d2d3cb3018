"""What a job of policy `auto` asks the engine for: a choice of level, as late as possible."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dycoke_core.auto import AutoConfig, Choice
from dycoke_core.level_choice import Outlook
from dycoke_core.sequence import Sequence

if TYPE_CHECKING:
    from dycoke_core.engine import Engine


@dataclass(slots=True, eq=False)
class ChoiceRequest:
    """Its methods are called on the engine's thread.

    Args:
        outlook: called with each choice.
        accepted_at_s: Unix time.
        queued_at_s: Unix time; later, if reading the video took a while.
    """

    sequence: Sequence
    config: AutoConfig
    outlook: Callable[[], Outlook]
    accepted_at_s: float
    queued_at_s: float
    prefix_keys: frozenset[str] = frozenset()  # set by `choose_cached`
    cached: Choice | None = None  # the last choice
    _tried: set[str] = field(default_factory=set)  # the keys that were cached then

    @property
    def waited_s(self) -> float:
        return max(time.time() - self.accepted_at_s, 0.0)

    @property
    def queued_s(self) -> float:
        return max(time.time() - self.queued_at_s, 0.0)

    def choose_cached(self, engine: "Engine") -> bool:
        """Chooses a level whose prefix is cached or on its way; False: there is none to take.

        Raises:
            DycokeError: the engine does not take the sequence at any level.
        """
        found = engine.choose_cached(
            self.sequence,
            self.config,
            self.outlook(),
            waited_s=self.waited_s,
            queued_s=self.queued_s,
        )
        self.prefix_keys, self.cached = found.prefix_keys, found.choice
        self._tried = self._present(engine)
        return self.cached is not None

    def is_due(self, engine: "Engine") -> bool:
        """Whether to choose now: the engine has little else to do, or a prefix is available.
        A job that is late does not wait for more, so that others may overtake it.
        """
        if self.waited_s >= self.config.objective_s:
            return True
        if engine.can_choose(self.config, self.sequence.priority):
            return True
        return not self._present(engine) <= self._tried and self.choose_cached(engine)

    def choose(self, engine: "Engine") -> Choice:
        """Raises as `choose_cached`."""
        return self.cached or engine.choose_compression(
            self.sequence,
            self.config,
            self.outlook(),
            waited_s=self.waited_s,
            queued_s=self.queued_s,
        )

    def _present(self, engine: "Engine") -> set[str]:
        return set(filter(engine.has_prefix, self.prefix_keys))
