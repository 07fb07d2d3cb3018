"""What a job with `kept_mask` leaves in the store."""

import numpy as np

from dycoke_core.kept_sets import KeptHistory, KeptRecorder

HISTORY_OF_TOKENS = 4


def history(*, num_stored: int | None = None) -> KeptHistory:
    """Of 2 x 2 tokens the first, second and fourth go in; each step keeps two of them."""
    recorder = KeptRecorder(units=1, rows=2, columns=2, kept=np.array([0, 1, 3]))
    for token in range(1, HISTORY_OF_TOKENS):
        recorder.add(token, np.delete(np.arange(3), token % 3))
    made = recorder.history(HISTORY_OF_TOKENS)
    if num_stored is not None:
        object.__setattr__(made, "num_stored", num_stored)
    return made
