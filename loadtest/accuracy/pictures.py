"""What the model looks at and what compression leaves: one answer, as pictures."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import pyplot
from torch import Tensor

from dycoke_core.compression import ttm
from dycoke_core.engine import Engine, SamplingParams, Sequence
from dycoke_core.kept_sets import KeptHistory
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import ChatMessage, FrameTiming
from loadtest.baselines.cached_attention import (
    CachedAttention,
    attention_weights,
    generate,
    text_of,
)

MAX_TOKENS = 64
NUM_SHOWN = 8  # units


class RecordingAttention(CachedAttention):
    """Records what each generated token attends to, averaged over heads.

    weights: by layer, float32 [S] for each decode step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, list[Tensor]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        is_decoding = layer in self.keys
        output = super().attend(layer, query, key, value, scaling)
        if is_decoding:
            weights = attention_weights(query[0, :, -1], self.keys[layer], scaling)
            self.weights.setdefault(layer, []).append(weights)
        return output


@dataclass(frozen=True, slots=True)
class Gaze:
    """One answer and what its tokens attended to.

    Args:
        kept: int64 [V], places of the visual tokens among the F * N.
        by_layer: float32 [T, steps, V].
    """

    text: str
    kept: Tensor
    by_layer: Tensor


@torch.inference_mode()
def watch(model: LlavaOnevision, frames: npt.NDArray[np.uint8], question: str, k: float) -> Gaze:
    """Answers a question from what stage I keeps, without stage II."""
    *_, features = model.encode_frames(torch.from_numpy(frames))
    assert features is not None
    kept = ttm.select_tokens(features, k)
    prompt = model.prompt_encoder((ChatMessage("user", question),))
    prefix, _ = model.embed_prefix(prompt.ids_before_video, features.flatten(0, 1)[kept])
    embeds = torch.cat([prefix, model.embed_tokens(prompt.ids_after_video)])
    attention = RecordingAttention()
    token_ids = generate(model, embeds, attention, max_tokens=MAX_TOKENS)
    visual = slice(len(prompt.ids_before_video), len(prompt.ids_before_video) + len(kept))
    by_layer = torch.stack(
        [
            torch.stack([step[visual] for step in attention.weights[layer]])
            for layer in sorted(attention.weights)
        ]
    )
    return Gaze(text_of(model, token_ids), kept, by_layer)


def draw_attention(
    model: LlavaOnevision, frames: npt.NDArray[np.uint8], question: str, path: Path
) -> None:
    """The paper's Figure 2: decode steps across, visual tokens down, averaged over all layers."""
    gaze = watch(model, frames, question, k=0.0)
    weights = gaze.by_layer.mean(dim=0).T.float().cpu().numpy()  # [V, steps]
    figure, axis = pyplot.subplots(figsize=(8, 6), layout="constrained")
    floor = max(float(np.quantile(weights, 0.5)), 1e-8)
    image = axis.imshow(
        np.log10(np.maximum(weights, floor)),
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
        extent=(0.5, weights.shape[1] + 0.5, len(weights), 0),
    )
    marks = range(0, len(frames), 4)
    axis.set_yticks([mark * model.tokens_per_frame for mark in marks], [f"#{m + 1}" for m in marks])
    axis.set_ylabel("visual tokens, by frame")
    axis.set_xlabel("decode step")
    axis.set_title(gaze.text, fontsize=7, wrap=True)
    figure.colorbar(image, label="attention, log10; below the median: black")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def draw_kept_tokens(
    engine: Engine,
    frames: npt.NDArray[np.uint8],
    timing: FrameTiming,
    question: str,
    path: Path,
    *,
    first_frame: int = 0,
) -> None:
    """Some units, what stage I keeps of them, and what the first and last decode steps attend to
    in the pruned layers. Of a unit its first frame is shown."""
    model = engine.model
    text, kept = _kept_of_answer(engine, frames, timing, question)
    size = (kept.units, kept.rows, kept.columns)
    rows = {"frames": np.ones(size, np.bool_), "stage I": _mask(kept.stage_one, size)}
    if kept.last is not None:
        first = kept.stage_two(1)
        assert first is not None, "a first selection precedes the last"
        rows |= {
            "stage II, first step": _mask(first, size),
            "stage II, last step": _mask(kept.last, size),
        }
    start = first_frame // model.frames_per_unit
    shown = range(start, min(start + NUM_SHOWN, kept.units))
    figure, axes = pyplot.subplots(
        len(rows),
        len(shown),
        figsize=(1.35 * len(shown), 1.4 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for line, (name, mask) in zip(axes, rows.items(), strict=True):
        for axis, unit in zip(line, shown, strict=True):
            frame = unit * model.frames_per_unit
            axis.imshow(_dimmed(frames[frame], mask[unit]))
            axis.set_xticks([])
            axis.set_yticks([])
            if name == "frames":
                axis.set_title(f"#{frame + 1}", fontsize=8)
        line[0].set_ylabel(name, fontsize=7)
    figure.suptitle(f"{question}  {text}", fontsize=7, wrap=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _kept_of_answer(
    engine: Engine, frames: npt.NDArray[np.uint8], timing: FrameTiming, question: str
) -> tuple[str, KeptHistory]:
    """An idle engine's answer with the default compression, and what was kept for it."""
    sequence = Sequence(
        "shown",
        (ChatMessage("user", question),),
        frames,
        SamplingParams(max_tokens=MAX_TOKENS),
        timing=timing,
        wants_kept_sets=True,
    )
    engine.add(sequence)
    while True:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.report is not None:
                assert event.report.kept is not None
                return event.report.text, event.report.kept


def _mask(bitset: bytes, size: tuple[int, int, int]) -> npt.NDArray[np.bool_]:
    """[units, rows, columns]."""
    bits = np.unpackbits(np.frombuffer(bitset, np.uint8), count=math.prod(size))
    return bits.reshape(size).astype(np.bool_)


def _dimmed(frame: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """The frame [H, W, 3], nearly white outside the mask [rows, columns] of tokens."""
    cells = torch.from_numpy(mask).float()[None, None]
    pixels = torch.nn.functional.interpolate(cells, size=frame.shape[:2], mode="nearest")[0, 0]
    kept = pixels.numpy()[..., None]
    dimmed = frame * kept + (0.2 * frame + 0.8 * 235) * (1 - kept)
    return np.asarray(dimmed, np.uint8)
