"""Learning rates by step: a warm-up, a plateau, a linear decay to zero. Knows no clock."""

import math

WARMUP_STEPS = 40
DECAY = 0.35  # share of the steps


def learning_rate_factor(step: int, num_steps: int) -> float:
    """What step `step` of `num_steps` multiplies every learning rate with."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (num_steps - step) / (DECAY * num_steps))


def steps_to_finish(step: int) -> int:
    """How long a run is, in all, whose decay begins at `step`."""
    return max(step + 1, math.ceil(step / (1 - DECAY)))
