"""Learning rates by step: a warm-up, a slow fall, then a linear decay to zero. Knows no clock."""

import math

WARMUP_STEPS = 40
FULL_STEPS = 150  # at the full rate; then it falls with the root of the step
DECAY = 0.35  # share of the steps


def learning_rate_factor(step: int, num_steps: int) -> float:
    """What step `step` of `num_steps` multiplies every learning rate with."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = min(1.0, math.sqrt(FULL_STEPS / (step + 1)))
    return rise * fall * min(1.0, (num_steps - step) / (DECAY * num_steps))


def steps_to_finish(step: int) -> int:
    """How long a run is, in all, whose decay begins at `step`."""
    return max(step + 1, math.ceil(step / (1 - DECAY)))
