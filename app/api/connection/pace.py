"""Measures how slowly a body arrives, by the time that is spent waiting for it."""


class Pace:
    """How many seconds a body is behind its minimum rate. Fast bytes make up for slow ones before
    them and earn no credit for later: a body that has come fast must keep coming.
    """

    def __init__(self) -> None:
        self.behind_s = 0.0

    def wait(self, seconds: float) -> None:
        """Counts the time in which the sender could have sent, without the reader's own."""
        self.behind_s += seconds

    def take(self, num_bytes: int, bytes_s: float) -> None:
        """Counts what has arrived, at this rate in bytes per second."""
        self.behind_s = max(0.0, self.behind_s - num_bytes / bytes_s)
