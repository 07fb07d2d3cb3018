"""What the model looks at and what compression leaves: one answer, as pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import pyplot
from torch import Tensor

from dycoke_core.compression import ttm
from dycoke_core.compression.counts import share_of
from dycoke_core.compression.kv_pruning import select_visual_tokens
from dycoke_core.config import CompressionConfig
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import ChatMessage
from loadtest.baselines.cached_attention import (
    CachedAttention,
    attention_weights,
    generate,
    text_of,
)

MAX_TOKENS = 64
NUM_SHOWN = 8  # frames


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
    model: LlavaOnevision,
    frames: npt.NDArray[np.uint8],
    question: str,
    path: Path,
    *,
    first_frame: int = 0,
) -> None:
    """Some frames, what stage I keeps of them, and what the first and last decode steps see."""
    config = CompressionConfig()
    gaze = watch(model, frames, question, k=config.k)
    scores = gaze.by_layer[max(config.l - 1, 0)]  # [steps, V]
    num_kept = share_of(1.0 - config.p, len(gaze.kept))
    grid = model.tokens_per_frame
    rows = {"frames": torch.arange(len(frames) * grid), "stage I": gaze.kept.cpu()}
    for name, step in (("first step", 0), ("last step", -1)):
        chosen = select_visual_tokens(scores[step], num_kept)
        rows[f"stage II, {name}"] = gaze.kept[chosen].cpu()
    shown = range(first_frame, min(first_frame + NUM_SHOWN, len(frames)))
    figure, axes = pyplot.subplots(
        len(rows), len(shown), figsize=(1.35 * len(shown), 1.4 * len(rows)), layout="constrained"
    )
    for line, (name, kept) in zip(axes, rows.items(), strict=True):
        mask = torch.zeros(len(frames) * grid)
        mask[kept] = 1.0
        for axis, frame in zip(line, shown, strict=True):
            axis.imshow(_dimmed(frames[frame], mask[frame * grid : (frame + 1) * grid]))
            axis.set_xticks([])
            axis.set_yticks([])
            if name == "frames":
                axis.set_title(f"#{frame + 1}", fontsize=8)
        line[0].set_ylabel(name, fontsize=7)
    figure.suptitle(f"{question}  {gaze.text}", fontsize=7, wrap=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _dimmed(frame: npt.NDArray[np.uint8], mask: Tensor) -> npt.NDArray[Any]:
    """The frame, nearly white outside the mask; the mask is a square grid of tokens."""
    side = round(len(mask) ** 0.5)
    cells = mask.view(1, 1, side, side)
    pixels = torch.nn.functional.interpolate(cells, size=frame.shape[:2], mode="nearest")[0, 0]
    kept = pixels.numpy()[..., None]
    dimmed = frame * kept + (0.2 * frame + 0.8 * 235) * (1 - kept)
    return np.asarray(dimmed, np.uint8)
