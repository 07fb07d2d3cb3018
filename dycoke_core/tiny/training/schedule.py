"""Learning rates by step: a warm-up, a slow fall, then a linear decay to zero. Knows no clock."""

import math

WARMUP_STEPS = 40
FULL_STEPS = 150  # at the full rate; then it falls with the root of the step
DECAY = 0.35  # share of the steps


def learning_rate_factor(step: int, num_steps: int) -> float:
    """The factor on every learning rate at step `step` of `num_steps`."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = min(1.0, math.sqrt(FULL_STEPS / (step + 1)))
    return rise * fall * min(1.0, (num_steps - step) / (DECAY * num_steps))


def steps_to_finish(step: int) -> int:
    """The total number of steps of a run whose decay starts at `step`."""
    return max(step + 1, math.ceil(step / (1 - DECAY)))
