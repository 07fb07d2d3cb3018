"""How much the review tries: what CI has minutes for, or `python -m tests.security --full`."""

import os
from dataclasses import dataclass

VARIABLE = "SECURITY_FULL"  # set: in full


@dataclass(frozen=True)
class Scale:
    """
    Args:
        num_examples: of each operation of the OpenAPI document, of valid and of invalid requests.
        num_mutants: of each clip.
        num_random: mutated bodies of each kind, for each path, and mutated requests.
        timeout_s: of one test.
    """

    num_examples: int
    num_mutants: int
    num_random: int
    timeout_s: int


IN_CI = Scale(num_examples=60, num_mutants=12, num_random=60, timeout_s=900)
IN_FULL = Scale(num_examples=400, num_mutants=60, num_random=600, timeout_s=4 * 3600)
SCALE = IN_FULL if os.environ.get(VARIABLE) else IN_CI
