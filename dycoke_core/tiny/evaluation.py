"""Measures how often a model is right on the test set, using the engine that serves requests.

Decoding is greedy, so a checkpoint, a policy and a question give one score. The laboratory compares
many policies; it starts from these scores, and the regression gate checks them.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dycoke_core.config import CompressionConfig
from dycoke_core.engine import Engine, SamplingParams
from dycoke_core.engine import Sequence as EngineSequence
from dycoke_core.sequence import ChatMessage
from dycoke_core.tiny.clip import write_video
from dycoke_core.tiny.questions import SHORT_FAMILIES, Question
from dycoke_core.tiny.render import Frames, render
from dycoke_core.tiny.scenes import SIZE, Scene
from dycoke_core.tiny.testset import MAX_TOKENS, ExamScene, score
from dycoke_core.video import FrameSpec, read_video_frames

Policy = str | Mapping[str, Any]
Source = Literal["frames", "file"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said under one policy, and its score."""

    seed: int  # of the scene
    family: str
    policy: int  # index into the policies passed in
    text: str
    score: float


def answers(
    engine: Engine,
    exam: Sequence[ExamScene],
    policies: Sequence[Policy],
    *,
    source: Source = "frames",
) -> Iterator[list[Answer]]:
    """Asks all questions under all policies; yields one list per scene, in order.

    Args:
        source: "file" sends each scene through an H.264 file and the service's frame reader.
    """
    for item in exam:
        frames = render(item.scene) if source == "frames" else read_back(item.scene)
        found: list[Answer] = []
        for number, policy in enumerate(policies):
            for question in item.questions:
                text = ask(engine, frames, question, policy)
                points = score(question, text)
                found.append(Answer(item.scene.seed, question.family, number, text, points))
        engine.clear_caches()
        yield found


def ask(engine: Engine, frames: Frames, question: Question, policy: Policy) -> str:
    """The model's answer, greedy."""
    sequence = EngineSequence(
        sequence_id="exam",
        messages=(ChatMessage("user", question.text),),
        frames=frames,
        sampling=SamplingParams(max_tokens=MAX_TOKENS[question.family]),
        compression=CompressionConfig.parse(policy),
    )
    engine.add(sequence)
    text = ""
    while engine.has_work:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            text += event.text
    return text


def read_back(scene: Scene) -> Frames:
    """The scene's frames after writing them to an H.264 file and reading them back."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "scene.mp4"
        write_video(path, render(scene))
        spec = FrameSpec(num_frames=scene.num_frames, image_size=SIZE)
        return read_video_frames(path, spec).pixels


def accuracies(found: Sequence[Answer], policy: int) -> dict[str, float]:
    """The mean score of each family under one policy."""
    scores: dict[str, list[float]] = {}
    for one in found:
        if one.policy == policy:
            scores.setdefault(one.family, []).append(one.score)
    return {family: sum(points) / len(points) for family, points in scores.items()}


def mean_of_short_families(by_family: Mapping[str, float]) -> float:
    return sum(by_family[family] for family in SHORT_FAMILIES) / len(SHORT_FAMILIES)


def wilson_interval(mean: float, number: int, *, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share found in `number` trials, at 95 % for the default `z`.

    Source: Wilson (1927). Wider than necessary for scores between 0 and 1.
    """
    centre = mean + z * z / (2 * number)
    spread = z * math.sqrt(mean * (1 - mean) / number + z * z / (4 * number * number))
    scale = 1 + z * z / number
    return (centre - spread) / scale, (centre + spread) / scale
