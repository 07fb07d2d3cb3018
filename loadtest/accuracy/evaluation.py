"""Runs every setting over every question: policies through the engine, many sequences at once.

What a video's questions and settings share is computed once: its features, and one prefix for each
stage I. Baselines that cannot share a prefix run one answer at a time, and reach inside
LLaVA-OneVision: for other families they are not offered.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from dycoke_core.config import EngineConfig
from dycoke_core.engine import Engine, SamplingParams
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import FrameTiming, SequenceReport
from dycoke_core.sequence import Sequence as EngineSequence
from dycoke_core.tiny.testset import score
from loadtest.accuracy.clips import AskedQuestion, Clip, sample_frames
from loadtest.accuracy.settings import FASTV_RATIO, PRUMERGE_RATIO, Setting
from loadtest.baselines.cached_attention import CachedAttention, generate, text_of
from loadtest.baselines.fastv import FastVAttention
from loadtest.baselines.prumerge import look_at, merge_tokens


@dataclass(slots=True)
class Outcome:
    """What one setting did: a score by question, and how often stage II refreshed."""

    scores: dict[int, float] = field(default_factory=dict)
    num_decode_steps: int = 0  # steps that could have refreshed
    num_refreshes: int = 0

    @property
    def refresh_rate(self) -> float:
        """Refreshes per decode step that could have refreshed; 0 if none could."""
        return self.num_refreshes / self.num_decode_steps if self.num_decode_steps else 0.0

    def in_order(self) -> npt.NDArray[np.float64]:
        """float64 [questions]: the scores of all questions."""
        return np.array([self.scores[index] for index in range(len(self.scores))])

    def add(self, other: "Outcome") -> None:
        """Adds what the setting did with other questions."""
        self.scores |= other.scores
        self.num_decode_steps += other.num_decode_steps
        self.num_refreshes += other.num_refreshes


Outcomes = dict[str, Outcome]  # by the settings' names


def open_engine(model: VideoLanguageModel) -> Engine:
    """One for all that a process asks the model: on a GPU it takes most of the free memory."""
    return Engine(model, EngineConfig(device=str(model.device), max_running_sequences=256))


class Laboratory:
    """
    Args:
        engine: idle; its caches are cleared after each examination.
        settings: all of them policies, unless the model is a LLaVA-OneVision.
    """

    def __init__(self, engine: Engine, settings: Sequence[Setting]) -> None:
        self._model = engine.model
        self._settings = settings
        self._engine = engine

    def examine(self, clips: Sequence[Clip]) -> Outcomes:
        """Asks all questions about some videos under all settings."""
        outcomes = {setting.name: Outcome() for setting in self._settings}
        videos = [(clip, clip.frames(self._model.image_size)) for clip in clips]
        policies = [setting for setting in self._settings if setting.method == "policy"]
        asked = self._ask_all(policies, videos)
        for name, report in _drain(self._engine):
            setting, question = asked[name]
            _note_policy(outcomes[setting.name], question, report)
        self._engine.clear_caches()
        for setting in self._settings:
            if setting.method != "policy":
                for clip, frames in videos:
                    scores = self._run_baseline(setting, clip, torch.from_numpy(frames))
                    outcomes[setting.name].scores |= scores
        return outcomes

    def _ask_all(
        self, settings: Sequence[Setting], videos: Sequence[tuple[Clip, npt.NDArray[np.uint8]]]
    ) -> dict[str, tuple[Setting, AskedQuestion]]:
        """Adds a sequence for every setting and question; returns what each asks, by its id."""
        asked: dict[str, tuple[Setting, AskedQuestion]] = {}
        for setting in settings:
            for clip, pixels in videos:
                spread = self._model.frame_spread
                frames = sample_frames(pixels, setting.num_frames, spread)
                timing = clip.timing(setting.num_frames, spread)
                for question in clip.questions:
                    name = f"{setting.name}/{question.index}"
                    asked[name] = (setting, question)
                    self._engine.add(_sequence(name, setting, clip, question, frames, timing))
        return asked

    def _run_baseline(self, setting: Setting, clip: Clip, frames: torch.Tensor) -> dict[int, float]:
        assert isinstance(self._model, LlavaOnevision), "others have no baselines"
        answers = answer_with_fastv if setting.method == "fastv" else answer_with_prumerge
        texts = answers(self._model, frames, clip.questions, setting)
        return {
            asked.index: score(asked.question, text)
            for asked, text in zip(clip.questions, texts, strict=True)
        }


@torch.inference_mode()
def answer_with_fastv(
    model: LlavaOnevision,
    frames: torch.Tensor,
    questions: Sequence[AskedQuestion],
    setting: Setting,
) -> list[str]:
    """Answers each question with its own prefill: what is pruned depends on the question."""
    *_, features = model.encode_frames(frames)
    assert features is not None
    texts = []
    for question in questions:
        prompt = model.prompt_encoder(question.messages)
        prefix, _ = model.embed_prefix(prompt.ids_before_video, features.flatten(0, 1))
        embeds = torch.cat([prefix, model.embed_tokens(prompt.ids_after_video)])
        first = len(prompt.ids_before_video)
        attention = FastVAttention(
            range(first, first + features.shape[0] * features.shape[1]),
            layer=setting.layer,
            retained_ratio=FASTV_RATIO,
        )
        token_ids = generate(model, embeds, attention, max_tokens=question.max_tokens)
        texts.append(text_of(model, token_ids))
    return texts


@torch.inference_mode()
def answer_with_prumerge(
    model: LlavaOnevision,
    frames: torch.Tensor,
    questions: Sequence[AskedQuestion],
    setting: Setting,
) -> list[str]:
    """Answers all questions; the tokens do not depend on them, so their rows are computed once."""
    _, tokens = merge_tokens(look_at(model, frames), PRUMERGE_RATIO)
    attention = CachedAttention()
    texts, num_prefix = [], 0
    for question in questions:
        prompt = model.prompt_encoder(question.messages)
        if not num_prefix:
            prefix, positions = model.embed_prefix(prompt.ids_before_video, tokens)
            num_prefix = prefix.shape[0]
            model.forward(prefix, positions, attention)
        attention.cut(num_prefix)
        token_ids = generate(
            model,
            model.embed_tokens(prompt.ids_after_video),
            attention,
            start=num_prefix,
            max_tokens=question.max_tokens,
        )
        texts.append(text_of(model, token_ids))
    return texts


def _sequence(
    name: str,
    setting: Setting,
    clip: Clip,
    question: AskedQuestion,
    frames: npt.NDArray[np.uint8],
    timing: FrameTiming,
) -> EngineSequence:
    return EngineSequence(
        sequence_id=name,
        messages=question.messages,
        frames=frames,
        sampling=SamplingParams(max_tokens=question.max_tokens),
        compression=setting.for_video(clip.scene.seed),
        timing=timing,
        video_key=f"{clip.index}",
    )


def _note_policy(outcome: Outcome, asked: AskedQuestion, report: SequenceReport) -> None:
    outcome.scores[asked.index] = score(asked.question, report.text)
    compression = report.compression
    if compression.visual_tokens_decode < compression.visual_tokens_prefill:
        outcome.num_decode_steps += max(compression.decode_steps - 1, 0)
        outcome.num_refreshes += compression.refreshes


def _drain(engine: Engine) -> Iterator[tuple[str, SequenceReport]]:
    while engine.has_work:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.report is not None:
                yield event.sequence_id, event.report
