"""Whether the bytes that several sequences need are available at the same time.

It sums keys and values of seats and prefixes on the device, and features of videos that are still
to become prefixes. Shared entries count once, and entries without a holder count as free. If all of
a backend's allocations have one height, enough bytes are enough room. If heights mix (prefixes of
which a part may be in host memory), the free bytes may not be in pieces that fit, which only
opening a seat shows.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from dycoke_core.engine.backend import Backend
from dycoke_core.engine.prefix_cache import Prefix, SharedPool, Video
from dycoke_core.engine.state import SequenceState


class Room:
    """Args:
    video_bytes: of the features of a sequence's video.
    """

    def __init__(
        self,
        backend: Backend,
        prefixes: SharedPool[Prefix],
        videos: SharedPool[Video],
        video_bytes: Callable[[SequenceState], int],
    ) -> None:
        self._backend = backend
        self._prefixes = prefixes
        self._videos = videos
        self._video_bytes = video_bytes

    def fits(self, states: Sequence[SequenceState]) -> bool:
        """Whether all of them, running or waiting, could run at once, without any others."""
        num_holders = Counter(state.prefix_key for state in states if state.prefix is not None)
        kv_bytes = sum(self._seat_bytes(state) for state in states)
        feature_bytes: dict[str, int] = {}
        for key, state in {state.prefix_key: state for state in states}.items():
            prefix = self._prefixes.get(key)
            if prefix is not None and (num_holders[key] or prefix.outlives_holders):
                kv_bytes += prefix.num_bytes
                if prefix.video is not None:
                    feature_bytes[prefix.video.key] = prefix.video.num_bytes
            else:
                kv_bytes += self._backend.prefix_bytes(state.layout.prefix)
                if state.has_video:
                    feature_bytes[state.video_key] = self._video_bytes(state)
        has_features_room = sum(feature_bytes.values()) <= self._videos.budget.max_bytes
        return has_features_room and kv_bytes <= self._prefixes.budget.max_bytes

    def _seat_bytes(self, state: SequenceState) -> int:
        return state.reserved_bytes or self._backend.seat_bytes(state.layout)
