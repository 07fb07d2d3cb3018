"""Tells operators when this machine's clock is not the job store's.

Deadlines, and what a request has waited so far, cross machines as Unix times: a worker whose clock
is ahead ends jobs early, and policy `auto` compresses all of them as much as it may.
"""

import logging
import time

MAX_OFF_S = 2.0  # a reply may come late by less

logger = logging.getLogger(__name__)


class ClockCheck:
    def __init__(self) -> None:
        self._is_off = False

    def note(self, store_s: float) -> None:
        """Compares clocks; a difference is logged when it appears.

        Args:
            store_s: Unix time at which the store has just answered, by its clock.
        """
        ahead_s = time.time() - store_s
        is_off = abs(ahead_s) > MAX_OFF_S
        if is_off and not self._is_off:
            logger.warning(
                "this machine's clock is not the job store's: deadlines and policy auto suffer, "
                "synchronise the clocks",
                extra={"ahead_s": round(ahead_s, 1)},
            )
        self._is_off = is_off
