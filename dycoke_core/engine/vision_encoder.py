"""Runs the vision tower in slices: a micro-batch of frames, a few layers at a time.

Micro-batches take frames of several videos, oldest first. On a CPU one frame of a real tower takes
seconds, so even one micro-batch is cut by layers, and decodes run between the cuts.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dycoke_core.engine.prefix_cache import Video
from dycoke_core.model.llava_onevision import LlavaOnevision


class VisionEncoder:
    def __init__(self, model: LlavaOnevision, *, batch_frames: int, slice_layers: int) -> None:
        self._model = model
        self._batch_frames = batch_frames
        self._slice_layers = slice_layers
        self._batch: list[Video] = []  # the owner of each frame that is being encoded
        self._slices: Iterator[Tensor | None] | None = None
        self._suspects: list[Video] = []  # of a micro-batch that failed: each goes alone

    def encode_slice(self, videos: Sequence[Video]) -> None:
        """Advances the micro-batch under way, or begins one from the videos in their order.

        `Video.num_encoded` grows when a micro-batch is through.
        """
        if self._slices is None:
            self._begin(videos)
        assert self._slices is not None
        features = next(self._slices)
        if features is not None:
            self._finish(features)

    def drop_failed_batch(self) -> list[Video]:
        """Forgets the micro-batch that failed, and says whose fault it was.

        Of several videos each is tried on its own from now on, and none is to blame yet.
        """
        owners = list(dict.fromkeys(self._batch))
        self._drop_batch()
        if len(owners) == 1:
            return owners
        self._suspects += owners
        return []

    def drop_orphaned_batch(self) -> None:
        """Forgets a micro-batch whose videos nobody waits for any more."""
        if self._batch and all(video.holders == 0 for video in self._batch):
            self._drop_batch()

    def _drop_batch(self) -> None:
        self._batch, self._slices = [], None

    def _begin(self, videos: Sequence[Video]) -> None:
        self._suspects = [video for video in self._suspects if video.holders]
        if videos[0] in self._suspects:
            videos = videos[:1]
        else:
            videos = [video for video in videos if video not in self._suspects]
        frames: list[Tensor] = []
        for video in videos:
            assert video.frames is not None
            room = self._batch_frames - len(frames)
            for index in video.distinct[video.num_encoded :][:room]:
                self._batch.append(video)  # first: if its frame cannot be taken, it is to blame
                frames.append(torch.from_numpy(np.ascontiguousarray(video.frames[index])))
        self._slices = self._model.encode_frames(torch.stack(frames), self._slice_layers)

    def _finish(self, features: Tensor) -> None:
        """features: [b, N, D]."""
        for video, rows in zip(self._batch, features, strict=True):
            if video.features is None:
                video.features = rows.new_empty((len(video.distinct), *rows.shape))
            video.features[video.num_encoded] = rows
            video.num_encoded += 1
            if video.is_ready:
                video.frames = None
        self._drop_batch()
