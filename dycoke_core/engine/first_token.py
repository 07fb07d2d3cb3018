"""Predicts when a sequence that is added now would have its first token.

The prediction uses the work that the engine still has to do before it, the sequence's own work, and
rates that are measured while the engine runs. Work that is cached, on its way, or shared by several
sequences counts once.

Not covered: waiting for KV memory or for a seat.
"""

from collections.abc import Collection, Iterable

from dycoke_core.config import PRIORITIES, Priority
from dycoke_core.engine.admission import Admission
from dycoke_core.engine.scheduler import Scheduler
from dycoke_core.engine.state import SequenceState
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.precedence import RANKS
from dycoke_core.rates import Rates, Work


class FirstTokenPredictor:
    def __init__(
        self,
        model: VideoLanguageModel,
        admission: Admission,
        scheduler: Scheduler[SequenceState],
        rates: Rates,
    ) -> None:
        self._model = model
        self._admission = admission
        self._scheduler = scheduler
        self._rates = rates

    def seconds(self, work: Work) -> float:
        """How many seconds the work takes next to the sequences that decode now."""
        is_decoding = any(state.can_decode for state in self._scheduler.running)
        return self._rates.seconds(work, is_decoding=is_decoding)

    def earliest_s(self, state: SequenceState) -> float | None:
        """Seconds to the first token of a sequence that is added now, assuming that lower
        priorities give way. None until enough has run to measure.
        """
        work = self.work_before(state) + self.own_work(state)
        return self.seconds(work) if self._rates.are_measured(work) else None

    def work_before(self, state: SequenceState) -> Work:
        """What comes before a sequence that is added now. What it shares counts in any case."""
        return self.work_ahead(state.priority, (state.prefix_key, state.video_key))

    def work_ahead(
        self, priority: Priority = PRIORITIES[-1], shared_keys: Collection[str] = ()
    ) -> Work:
        """What the engine has to do before a sequence that is added now. Asked after every step for
        each choice that waits, so sequences that only decode cost next to nothing.

        Args:
            priority: the lowest of what counts.
            shared_keys: of prefixes and videos that count whichever sequence makes them.
        """
        running = (state for state in self._scheduler.running if state.has_prompt_left)
        everyone = (*running, *self._scheduler.waiting)
        ahead = [state for state in everyone if RANKS[state.priority] <= RANKS[priority]]
        shared = {
            key: work
            for state in (everyone if shared_keys else ahead)
            for key, work in self._shared_work(state)
            if key in shared_keys or RANKS[state.priority] <= RANKS[priority]
        }
        own = sum(max(state.num_question_tokens - state.num_own_run, 0) for state in ahead)
        return sum(shared.values(), start=Work(0, own))

    def own_work(self, state: SequenceState) -> Work:
        """The work that a sequence adds if it is not in the engine yet."""
        is_cached = self.has_prefix(state.prefix_key)
        is_encoded = is_cached or self._is_encoded(state)
        return Work(
            vision_patches=0 if is_encoded else self._patches(state, len(state.distinct_units)),
            prompt_tokens=(0 if is_cached else state.num_prefix_tokens) + state.num_question_tokens,
        )

    def has_prefix(self, key: str) -> bool:
        """Whether a prefix is cached or on its way."""
        return self._admission.has_prefix(key) or any(
            other.prefix_key == key for other in self._scheduler.waiting
        )

    def _is_encoded(self, state: SequenceState) -> bool:
        """Whether its video's features are cached, or will be before its turn."""
        return self._admission.has_video(state.video_key) or any(
            other.video_key == state.video_key
            and not self._admission.has_prefix(other.prefix_key)  # which needs no features
            for other in self._scheduler.waiting
        )

    def _patches(self, state: SequenceState, num_units: int) -> int:
        clip = state.prompt.clip
        if clip is None:
            return 0
        return num_units * self._model.vision_geometry(clip.height, clip.width).num_patches

    def _shared_work(self, state: SequenceState) -> Iterable[tuple[str, Work]]:
        """Shared work by the key under which others may share it."""
        if state.prefix is None:
            if not self._admission.has_prefix(state.prefix_key):
                yield state.prefix_key, Work(0, state.num_prefix_tokens)
                if not self._admission.has_video(state.video_key):
                    yield state.video_key, Work(self._patches(state, len(state.distinct_units)), 0)
            return
        prefix, video = state.prefix, state.prefix.video
        yield state.prefix_key, Work(0, prefix.num_tokens - prefix.num_run)
        if video is not None:
            num_left = len(video.distinct) - video.num_encoded
            yield state.video_key, Work(self._patches(state, num_left), 0)
