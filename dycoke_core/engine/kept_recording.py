"""Records what one sequence kept, if its client asks: the device's part of `dycoke_core.kept_sets`.

Nothing here waits for the device: what stage I kept is copied before the question runs, and read
when a later step's outcome has come back.
"""

from dataclasses import dataclass

from torch import Tensor

from dycoke_core.engine.backend import KeptPlaces
from dycoke_core.kept_sets import KeptHistory, KeptRecorder
from dycoke_core.transfer import HostCopy


@dataclass(slots=True, eq=False)
class KeptRecording:
    """
    Args:
        grid: rows and columns of a unit's tokens.
    """

    num_units: int
    grid: tuple[int, int]
    _stage_one: HostCopy | None = None
    _recorder: KeptRecorder | None = None

    def begin(self, kept: Tensor | None) -> None:
        """Takes what stage I kept, once.

        Args:
            kept: int64 [V] on the device. None for a ready-made prefix, where it is not known: then
                nothing is recorded.
        """
        if self._stage_one is None and kept is not None:
            self._stage_one = HostCopy(kept)

    def add(self, token: int, places: KeptPlaces) -> None:
        """Takes what stage II kept when a token of the answer was made."""
        if (recorder := self._opened()) is not None:
            recorder.add(token, places)

    def history(self, num_tokens: int) -> KeptHistory | None:
        """Args: num_tokens: length of the whole answer."""
        recorder = self._opened()
        return None if recorder is None else recorder.history(num_tokens)

    def _opened(self) -> KeptRecorder | None:
        if self._recorder is None and self._stage_one is not None:
            kept = self._stage_one.read().numpy()
            self._recorder = KeptRecorder(self.num_units, *self.grid, kept)
        return self._recorder
