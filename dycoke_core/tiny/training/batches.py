"""Training batches, drawn only from their key: a resumed run sees what the first would have seen.

Scenes are from the training split. A batch of frames trains the vision tower; a batch of videos,
each with many questions, trains the language model.
"""

from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from dycoke_core.preprocess import PromptEncoder
from dycoke_core.sequence import ChatMessage
from dycoke_core.tiny.questions import (
    FAMILIES,
    GUESS,
    SHORT_FAMILIES,
    Question,
    guess_about,
    questions_about,
)
from dycoke_core.tiny.render import RGB, render, render_frames
from dycoke_core.tiny.scenes import BACKGROUNDS, HELD_OUT, Scene, Split, sample_scene
from dycoke_core.tiny.tokenizer import CHAT_TEMPLATE, TURN_END, VIDEO, build_tokenizer
from dycoke_core.tiny.training.targets import (
    FrameLabels,
    HistoryLabels,
    frame_labels,
    history_labels,
)

IGNORED = -100
ASKED = (*FAMILIES, GUESS)  # what a question of a batch can be
NUM_SHORT = 12  # questions per video, next to the description
SHORT_TOKENS, DESCRIPTION_TOKENS = 26, 54  # of a question with its answer, padded
_SEEDS_PER_BATCH = 1024
_PAINT_KEY = 8
_COLORS_APART = 70  # of 255 * sqrt(3)
_LANGUAGE_SEED = 2**40  # where the videos' seeds start, away from the frames'

# How often a family is asked if a scene allows more questions than there is room for.
_WEIGHTS = dict.fromkeys(SHORT_FAMILIES, 1.0) | {
    "shape": 0.7,
    "transition": 0.7,
    "direction": 1.2,
    "first": 3.0,
    "last": 3.0,
    "end_color": 1.2,
    "stationary": 2.0,
    "action_count": 3.0,
    "brief_event": 3.0,
}


@dataclass(frozen=True, slots=True, eq=False)
class FrameBatch:
    frames: Tensor  # uint8 [B, S, S, 3]
    color: Tensor  # the fields of FrameLabels, [B, N, ...]
    shape: Tensor
    offset: Tensor
    place: Tensor
    outline: Tensor
    background: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class QuestionBlock:
    """Questions of one length, each with its answer: several per video."""

    ids: Tensor  # int64 [B, questions, tokens]
    targets: Tensor  # the next token where it belongs to the answer, else IGNORED
    families: Tensor  # int64 [B, questions], index into ASKED


@dataclass(frozen=True, slots=True, eq=False)
class VideoBatch:
    frames: Tensor  # uint8 [B, F, S, S, 3]
    blocks: tuple[QuestionBlock, ...]
    history: dict[str, Tensor]  # the fields of HistoryLabels, [B, F, N]


@dataclass(frozen=True, slots=True)
class BatchKey:
    """Identifies a batch: different keys give different scenes."""

    seed: int
    step: int
    worker: int = 0
    split: Split = "train"

    @property
    def first_scene(self) -> int:
        return ((self.seed * 64 + self.worker) * 2**20 + self.step) * _SEEDS_PER_BATCH


def frame_batch(key: BatchKey, *, num_frames: int) -> FrameBatch:
    """Frames, each of a different scene.

    In every other training scene things are painted in arbitrary colours, named or not, so that a
    shape is learnt as such and not as one of the colours that it was seen in.
    """
    first = key.first_scene
    shown: list[tuple[np.ndarray, FrameLabels]] = []
    for scene_seed in range(first, first + num_frames):
        scene = sample_scene(scene_seed, split=key.split, num_frames=8)
        if key.split == "train" and scene_seed % 2:
            scene = _repaint(scene)
        frame = scene_seed // 2 % scene.num_frames
        shown.append((render_frames(scene, range(frame, frame + 1))[0], frame_labels(scene, frame)))
    labels = {
        name: torch.from_numpy(np.stack([getattr(label, name) for _, label in shown]))
        for name in ("color", "shape", "offset", "place", "outline", "background")
    }
    return FrameBatch(torch.from_numpy(np.stack([frame for frame, _ in shown])), **labels)


def video_batch(
    key: BatchKey, *, num_videos: int, num_frames: int, has_guesses: bool = False
) -> VideoBatch:
    """Videos with NUM_SHORT short questions and one description each.

    Args:
        has_guesses: one of the short questions has no answer in the video.
    """
    first = _LANGUAGE_SEED + key.first_scene
    scenes = [
        sample_scene(seed, split=key.split, num_frames=num_frames)
        for seed in range(first, first + num_videos)
    ]
    histories = [history_labels(scene) for scene in scenes]
    questions = [_choose(scene, has_guess=has_guesses) for scene in scenes]
    return VideoBatch(
        frames=torch.from_numpy(np.stack([render(scene) for scene in scenes])),
        blocks=(
            _block([asked[:-1] for asked in questions], SHORT_TOKENS),
            _block([asked[-1:] for asked in questions], DESCRIPTION_TOKENS),
        ),
        history={
            field.name: torch.from_numpy(np.stack([getattr(h, field.name) for h in histories]))
            for field in fields(HistoryLabels)
        },
    )


def prefix_ids() -> tuple[int, ...]:
    """The ids before the video in every prompt."""
    return _prompt("Describe the video.")[0]


def encode_question(question: Question) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids after the video as the service would send them, and those of the answer."""
    return _prompt(question.text)[1], _answer_ids(question.answer)


def _repaint(scene: Scene) -> Scene:
    rng = np.random.default_rng([_PAINT_KEY, scene.seed])
    things = [replace(thing, paint=_any_color(rng, thing.shape)) for thing in scene.things]
    return replace(scene, things=tuple(things))


def _any_color(rng: np.random.Generator, shape: str) -> tuple[int, int, int]:
    """A colour not near one that the shape must not be seen in, nor near any background."""
    avoided = [RGB[color] for color, other in HELD_OUT if other == shape]
    avoided += [RGB[background] for background in BACKGROUNDS]
    while True:
        color = rng.integers(0, 256, 3)
        if min(np.linalg.norm(color - np.array(other)) for other in avoided) > _COLORS_APART:
            return (int(color[0]), int(color[1]), int(color[2]))


def _choose(scene: Scene, *, has_guess: bool) -> list[Question]:
    """NUM_SHORT questions, the last of them a guess if asked for, and the description."""
    *short, description = questions_about(scene)
    rng = np.random.default_rng([5, scene.seed])
    if len(short) < NUM_SHORT:
        again = questions_about(scene, draw=1)[:-1]
        chosen = (short + again + short * (NUM_SHORT // len(short)))[:NUM_SHORT]
    else:
        weights = np.array([_WEIGHTS[question.family] for question in short])
        places = rng.choice(len(short), NUM_SHORT, replace=False, p=weights / weights.sum())
        chosen = [short[place] for place in places]
    if has_guess:
        chosen[-1] = guess_about(scene, rng)
    return [*chosen, description]


def _block(asked: list[list[Question]], length: int) -> QuestionBlock:
    shape = (len(asked), len(asked[0]), length)
    ids, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED)
    for row, questions in enumerate(asked):
        for column, question in enumerate(questions):
            prompt, answer = encode_question(question)
            end = len(prompt) + len(answer)
            ids[row, column, :end] = prompt + answer
            targets[row, column, len(prompt) - 1 : end - 1] = answer
    families = [[ASKED.index(q.family) for q in questions] for questions in asked]
    return QuestionBlock(torch.from_numpy(ids), torch.from_numpy(targets), torch.tensor(families))


@lru_cache(maxsize=1)
def _encoder() -> PromptEncoder:
    tokenizer = build_tokenizer()
    video = tokenizer.convert_tokens_to_ids(VIDEO)
    return PromptEncoder(tokenizer, chat_template=CHAT_TEMPLATE, video_token_id=video)


@cache
def _prompt(question: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    prompt = _encoder()((ChatMessage("user", question),))
    return prompt.ids_before_video, prompt.ids_after_video


@lru_cache(maxsize=2**16)
def _answer_ids(answer: str) -> tuple[int, ...]:
    return tuple(_encoder().tokenizer(answer + TURN_END)["input_ids"])
