"""The test set's questions, numbered, with what the statistics need to know about each."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from dycoke_core.model_frames import Spread
from dycoke_core.sequence import ChatMessage, FrameTiming
from dycoke_core.tiny.clip import FPS
from dycoke_core.tiny.questions import DESCRIBE, FAMILIES, SHORT_FAMILIES, Question
from dycoke_core.tiny.render import render
from dycoke_core.tiny.scenes import SIZE, Scene
from dycoke_core.tiny.testset import FIRST_SEED, MAX_TOKENS, test_set
from dycoke_core.video.sampling import sample_indices

# Places in FAMILIES.
SHORT = tuple(range(len(SHORT_FAMILIES)))
BRIEF = (FAMILIES.index("brief_event"),)
DESCRIPTIONS = (FAMILIES.index(DESCRIBE),)


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    index: int  # among all questions
    question: Question

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        return (ChatMessage("user", self.question.text),)

    @property
    def max_tokens(self) -> int:
        return MAX_TOKENS[self.question.family]


@dataclass(frozen=True, slots=True)
class Clip:
    """One video and its questions, all asked while the video is in the engine's caches."""

    index: int
    scene: Scene
    questions: tuple[AskedQuestion, ...]

    def timing(self, num_frames: int, spread: Spread) -> FrameTiming:
        """Of the frames that `sample_frames` takes."""
        total = self.scene.num_frames
        times = tuple(place / FPS for place in sample_indices(range(total), num_frames, spread))
        return FrameTiming(times, duration_s=total / FPS)

    def frames(self, image_size: int) -> npt.NDArray[np.uint8]:
        """uint8 [F, S, S, 3] at the model's image size S, rendered again at each call."""
        frames = render(self.scene)
        return frames if image_size == SIZE else _resized(frames, image_size)


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """`families` and `videos`, int64 [questions]: each question's place in FAMILIES and clip."""

    clips: tuple[Clip, ...]
    families: npt.NDArray[np.int64]
    videos: npt.NDArray[np.int64]


def load_questions(num_questions: int, *, first_seed: int = FIRST_SEED) -> QuestionSet:
    """`num_questions` of every family.

    Args:
        first_seed: another one gives other scenes.
    """
    clips: list[Clip] = []
    families: list[int] = []
    videos: list[int] = []
    for exam in test_set(num_questions, first_seed=first_seed):
        asked = tuple(AskedQuestion(len(families) + i, q) for i, q in enumerate(exam.questions))
        families += [FAMILIES.index(question.family) for question in exam.questions]
        videos += [len(clips)] * len(asked)
        clips.append(Clip(len(clips), exam.scene, asked))
    return QuestionSet(tuple(clips), np.array(families), np.array(videos))


def _resized(frames: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    resized = interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def sample_frames(
    frames: npt.NDArray[np.uint8], number: int, spread: Spread
) -> npt.NDArray[np.uint8]:
    """Fewer frames of a video, as readers would choose them; may miss brief events."""
    if number == len(frames):
        return frames
    return frames[list(sample_indices(range(len(frames)), number, spread))]
