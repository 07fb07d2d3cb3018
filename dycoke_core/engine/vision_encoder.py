"""Runs the vision tower in slices: a micro-batch of units, a few layers at a time.

A micro-batch takes units of several videos with the same frame size, by priority and age. Its size
depends only on that of the frames, which bounds its memory (`budget`). The load only changes how
many layers run between two decode steps, which changes no result: a fixed number, or as many as
fill a time slice, estimated from the slices before; all of them while nothing decodes.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dycoke_core.config import Priority
from dycoke_core.engine.backend import Backend, Mark
from dycoke_core.engine.budget import units_per_batch
from dycoke_core.engine.prefix_cache import Video
from dycoke_core.frame_content import frames_of_unit
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.precedence import Precedence

SLICE_S = 0.015  # next to running answers: about two decode steps of a large batch
_FIRST_SLICE_LAYERS = 2  # until something has been measured
_ALL_LAYERS = 10**6
_MEMORY = 0.75  # of the running mean of a layer's seconds


class VisionSlice(NamedTuple):
    """Args:
    batch: number of the micro-batch that it was of.
    num_patches: of the micro-batch, where the slice completed it; else 0.
    """

    batch: int
    num_patches: int


class VisionEncoder:
    """Args:
    slice_layers: that run at a time; None: as many as take SLICE_S.
    """

    def __init__(
        self,
        model: VideoLanguageModel,
        backend: Backend,
        *,
        batch_frames: int,
        slice_layers: int | None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._batch_units = max(batch_frames // model.frames_per_unit, 1)
        self._slice_layers = slice_layers
        self._precedence = Precedence()
        self._batch: list[Video] = []  # the video of each unit that is being encoded
        self._batch_number = 0
        self._layers: Iterator[Tensor | None] | None = None
        self._suspects: list[Video] = []  # videos of a micro-batch that failed: each is tried alone
        self._last_slice: tuple[Mark, Mark, int] | None = None
        self._layer_s: float | None = None  # recent seconds per layer

    def encode_slice(self, videos: Mapping[Video, Priority], *, beside_decode: bool) -> VisionSlice:
        """Advances the current micro-batch, or begins one with waiting videos.

        `Video.num_encoded` grows when a micro-batch is through.

        Args:
            videos: longest admitted first, with the best priority of those that wait for each.
        """
        if self._layers is None:
            self._begin(videos)
        assert self._layers is not None
        num_layers = self._num_layers(beside_decode=beside_decode)
        began, num_run = self._backend.mark(), 0
        features = None
        while features is None and num_run < num_layers:
            features = next(self._layers)
            num_run += 1
        self._last_slice = began, self._backend.mark(), num_run
        if features is None:
            return VisionSlice(self._batch_number, 0)
        num_patches = len(self._batch) * self._patches_per_unit(self._batch[0])
        self._finish(features)
        return VisionSlice(self._batch_number, num_patches)

    def drop_failed_batch(self) -> list[Video]:
        """Forgets the micro-batch that failed, and says whose fault it was.

        Of several videos each is tried on its own from now on, and none is to blame yet.
        """
        owners = list(dict.fromkeys(self._batch))
        self._drop_batch()
        if len(owners) == 1:
            return owners
        self._suspects += [video for video in owners if video.holders]
        return []

    def drop_orphans(self) -> None:
        """Forgets videos that no sequence waits for any more, unless others share their
        micro-batch."""
        self._suspects = [video for video in self._suspects if video.holders]
        if self._batch and all(video.holders == 0 for video in self._batch):
            self._drop_batch()

    def _num_layers(self, *, beside_decode: bool) -> int:
        """How many layers the next slice runs."""
        if self._slice_layers is not None:
            return self._slice_layers
        self._learn_from_last_slice()
        if not beside_decode:
            return _ALL_LAYERS
        if self._layer_s is None:
            return _FIRST_SLICE_LAYERS
        return max(1, int(SLICE_S / self._layer_s))

    def _learn_from_last_slice(self) -> None:
        if self._last_slice is None or not self._backend.has_passed(self._last_slice[1]):
            return
        (began, ended, num_run), self._last_slice = self._last_slice, None
        layer_s = max(self._backend.seconds(began, ended) / num_run, 1e-6)
        before = self._layer_s if self._layer_s is not None else layer_s
        self._layer_s = _MEMORY * before + (1 - _MEMORY) * layer_s

    def _drop_batch(self) -> None:
        self._batch, self._layers = [], None

    def _begin(self, waiting: Mapping[Video, Priority]) -> None:
        oldest = next(iter(waiting))
        videos = self._precedence.ordered(waiting, waiting.__getitem__)
        if videos[0] in self._suspects:
            videos = videos[:1]
        else:
            videos = [video for video in videos if video not in self._suspects]
        self._batch_number += 1
        frames: list[npt.NDArray[np.uint8]] = []
        size = _frame_size(videos[0])
        max_units = units_per_batch(self._batch_units, self._patches_per_unit(videos[0]))
        for video in videos:
            if _frame_size(video) != size:
                continue
            room = max_units - len(self._batch)
            for unit in video.distinct[video.num_encoded :][:room]:
                self._batch.append(video)  # before its unit, which may fail
                frames += self._unit(video, unit)
        self._precedence.note(is_oldest_served=oldest in self._batch)
        self._layers = self._model.encode_frames(self._backend.stage_frames(frames))

    def _patches_per_unit(self, video: Video) -> int:
        return self._model.vision_geometry(*_frame_size(video)).num_patches

    def _unit(self, video: Video, unit: int) -> list[npt.NDArray[np.uint8]]:
        assert video.frames is not None
        indices = frames_of_unit(unit, self._model.frames_per_unit, len(video.frames))
        return [video.frames[index] for index in indices]

    def _finish(self, features: Tensor) -> None:
        """features: [b, N, features]."""
        for video in dict.fromkeys(self._batch):
            rows = features[self._batch.index(video) :][: self._batch.count(video)]
            if video.features is None:
                video.features = rows.new_empty((len(video.distinct), *rows.shape[1:]))
            video.features[video.num_encoded : video.num_encoded + len(rows)] = rows
            video.num_encoded += len(rows)
            if video.is_ready:
                video.frames = None
        self._drop_batch()


def _frame_size(video: Video) -> tuple[int, int]:
    """Height and width, in pixels."""
    assert video.frames is not None
    height, width = video.frames.shape[1:3]
    return height, width
