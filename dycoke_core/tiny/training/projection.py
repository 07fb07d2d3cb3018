"""Makes what visual tokens know easy for the language model to read.

After stage 1 linear heads can read from a token what its cell shows, but some of it is in numbers
so small that a language model takes many thousand steps to find it. So the projector's last matrix
is multiplied by another: each known fact about a cell gets its own direction, all equally strong,
in addition to what the token held before. This adds nothing that a linear map of the tokens did not
contain.
"""

from dataclasses import fields

import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_core.model.llava_onevision import encode_frames
from dycoke_core.tiny.architecture import GRID, HIDDEN_SIZE
from dycoke_core.tiny.scenes import BACKGROUNDS, SHAPES
from dycoke_core.tiny.training.batches import FrameBatch
from dycoke_core.tiny.training.targets import NOTHING, SEEN_COLORS

FACTS = (
    *SEEN_COLORS,
    *SHAPES,
    *BACKGROUNDS,
    "place x",
    "place y",
    "centre x",
    "centre y",
    "offset x",
    "offset y",
)
TOKEN_SCALE = 0.25  # standard deviation of a visual token's numbers
_LOUDNESS = 3.5  # strength of the facts, in standard deviations of what was there before
_RIDGE = 1e-6
_EMPTY_WEIGHT = 0.3  # of cells that show only background


def visual_tokens(model: LlavaOnevisionForConditionalGeneration, frames: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] → [B, N, D], as the engine computes them."""
    pixels = (frames.float() / 255 - 0.5) / 0.5
    *_, tokens = encode_frames(model.model, pixels.permute(0, 3, 1, 2))
    assert tokens is not None
    return tokens


@torch.no_grad()
def bring_out(model: LlavaOnevisionForConditionalGeneration, batch: FrameBatch, seed: int) -> None:
    """Folds the map into the projector; the same model, batch and seed give the same result."""
    is_plain = (batch.color != NOTHING).all(dim=1)  # not painted over: every colour has a name
    batch = FrameBatch(*(getattr(batch, field.name)[is_plain] for field in fields(FrameBatch)))
    tokens = visual_tokens(model, batch.frames).flatten(0, 1).double()  # [cells, D]
    mean, spread = tokens.mean(dim=0), tokens.std()
    known = _known(batch)
    weights = torch.where(batch.shape.flatten() == NOTHING, _EMPTY_WEIGHT, 1.0).double()
    reader = _read(tokens - mean, known, weights)  # [D, facts]
    reader = reader / ((tokens - mean) @ reader).std(dim=0)
    loud = _LOUDNESS * fact_directions(seed) @ reader.T
    matrix = torch.eye(HIDDEN_SIZE) / spread + loud
    shift = -matrix @ mean
    scale = TOKEN_SCALE / (tokens @ matrix.T + shift).std()
    last = model.model.multi_modal_projector.linear_2
    last.bias.copy_(scale * (matrix @ last.bias.double() + shift))
    last.weight.copy_(scale * (matrix @ last.weight.double()))


def fact_directions(seed: int) -> Tensor:
    """[D, facts], orthonormal: where each of FACTS is written in a visual token."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(HIDDEN_SIZE, len(FACTS), generator=generator, dtype=torch.float64)
    directions: Tensor = torch.linalg.qr(noise).Q
    return directions


def _known(batch: FrameBatch) -> Tensor:
    """[cells, facts]: the facts that each cell's token should show, in the order of FACTS."""
    shape = batch.shape.flatten()
    shown = shape != NOTHING
    facts = [
        torch.nn.functional.one_hot(batch.color.flatten(), len(SEEN_COLORS)),
        torch.nn.functional.one_hot(shape.clamp(min=0), len(SHAPES)) * shown[:, None],
        torch.nn.functional.one_hot(batch.background.flatten(), len(BACKGROUNDS)),
        batch.place.flatten(0, 1),
        (batch.place * GRID / 2 + batch.offset).flatten(0, 1) * shown[:, None],
        batch.offset.flatten(0, 1) * shown[:, None],
    ]
    return torch.cat([fact.double() for fact in facts], dim=1)


def _read(tokens: Tensor, known: Tensor, weights: Tensor) -> Tensor:
    """The linear map from tokens to their known facts: weighted least squares."""
    weighted = tokens * weights[:, None]
    covariance = weighted.T @ tokens
    ridge = _RIDGE * covariance.diagonal().mean() * torch.eye(tokens.shape[1], dtype=tokens.dtype)
    target = known - known.mean(dim=0)
    reader: Tensor = torch.linalg.solve(covariance + ridge, weighted.T @ target)
    return reader
