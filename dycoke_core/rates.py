"""How fast an engine works, measured while it runs, and what that predicts. Standard library
only.
"""

import math
from dataclasses import dataclass

_MEMORY = 0.9  # of earlier observations, at each new one


@dataclass(frozen=True, slots=True)
class Work:
    """What has to be done before a first token; means of several are no whole numbers.

    Args:
        vision_patches: to be encoded.
        prompt_tokens: to be prefilled.
    """

    vision_patches: float
    prompt_tokens: float

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.vision_patches + other.vision_patches, self.prompt_tokens + other.prompt_tokens
        )

    def towards(self, other: "Work", share: float) -> "Work":
        """This share of the way to `other`."""
        return Work(
            self.vision_patches + share * (other.vision_patches - self.vision_patches),
            self.prompt_tokens + share * (other.prompt_tokens - self.prompt_tokens),
        )


@dataclass(slots=True)
class _Rate:
    """Seconds per unit, as a mean that forgets; a seed counts as one observation."""

    seconds: float
    amount: float = 1.0
    is_measured: bool = False

    @property
    def value(self) -> float:
        return self.seconds / self.amount

    def note(self, seconds: float, amount: float) -> None:
        """Large observations weigh more: fixed costs show in small ones."""
        self.seconds = _MEMORY * self.seconds + max(seconds, 0.0)
        self.amount = _MEMORY * self.amount + amount
        self.is_measured = True


class Rates:
    """How fast an engine works, measured as it runs.

    Args:
        patch_s: of vision, per patch.
        token_s: of prefill, per prompt token.
        step_s: of a decode step of all running sequences.
        max_prompt_tokens: of one pass.
    """

    def __init__(
        self, patch_s: float, token_s: float, step_s: float, *, max_prompt_tokens: int
    ) -> None:
        self._patch = _Rate(patch_s)
        self._token = _Rate(token_s)
        self._step = _Rate(step_s)
        self._steps_per_patch = _Rate(0.0)
        self._max_prompt_tokens = max_prompt_tokens

    def note_vision(self, num_patches: int, seconds: float, num_steps: int) -> None:
        """Takes in that patches were encoded in slices of this many steps."""
        self._patch.note(seconds, num_patches)
        self._steps_per_patch.note(num_steps, num_patches)

    def note_pass(self, seconds: float, *, num_prompt_tokens: int, is_decoding: bool) -> None:
        """Takes in a pass. A decode step that runs with a prompt is assumed to cost what it costs
        alone."""
        if not num_prompt_tokens:
            self._step.note(seconds, 1.0)
            return
        if is_decoding:
            seconds -= self._step.value
        self._token.note(seconds, num_prompt_tokens)

    def are_measured(self, work: Work) -> bool:
        """Whether this kind of work has run; until then its rates are seeds."""
        has_vision = self._patch.is_measured or not work.vision_patches
        return self._token.is_measured and has_vision

    def seconds(self, work: Work, *, is_decoding: bool) -> float:
        """How long the work takes, with a decode step in each of its steps."""
        seconds = work.vision_patches * self._patch.value + work.prompt_tokens * self._token.value
        if is_decoding:
            num_steps = work.vision_patches * self._steps_per_patch.value
            num_steps += math.ceil(work.prompt_tokens / self._max_prompt_tokens)
            seconds += num_steps * self._step.value
        return seconds
