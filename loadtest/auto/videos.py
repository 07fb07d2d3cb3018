"""Scenes as H.264 files, and the questions about each whose right answers are known."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from dycoke_core.tiny.clip import write_video
from dycoke_core.tiny.questions import Question, questions_about
from dycoke_core.tiny.render import render
from dycoke_core.tiny.scenes import sample_scene
from dycoke_core.tiny.testset import score

FIRST_SEED = 300_000  # of the test split, away from the scenes of the accuracy figures


@dataclass(frozen=True, slots=True)
class Video:
    """A scene's file, and everything that may be asked about it."""

    clip: bytes
    questions: tuple[Question, ...]


def make_videos(number: int, *, first_seed: int = FIRST_SEED) -> list[Video]:
    """Renders and encodes scenes of the test split; the same arguments give the same scenes."""
    videos = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.mp4"
        for seed in range(first_seed, first_seed + number):
            scene = sample_scene(seed, split="test")
            write_video(path, render(scene))
            videos.append(Video(path.read_bytes(), tuple(questions_about(scene))))
    return videos


def is_right(question: Question, text: str) -> bool:
    """Whether an answer is wholly right: for a description, all of its facts and no other."""
    return score(question, text) == 1.0
