"""Runs the vision tower in slices: a micro-batch of frames, a few layers at a time.

Micro-batches take frames of several videos, oldest first. On a CPU one frame of a real tower takes
seconds, so even one micro-batch is cut by layers, and decodes run between the cuts.
"""

from collections.abc import Iterator, Sequence

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

    def drop_batch(self) -> None:
        """Forgets the micro-batch under way, after a failure."""
        self._batch, self._slices = [], None

    def _begin(self, videos: Sequence[Video]) -> None:
        frames: list[Tensor] = []
        for video in videos:
            room = self._batch_frames - len(frames)
            assert video.frames is not None
            for index in video.distinct[video.num_encoded :][:room]:
                frames.append(torch.from_numpy(video.frames[index]))
                self._batch.append(video)
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
        self.drop_batch()
