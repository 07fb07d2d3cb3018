"""The paper's two stages in plain Python loops: what the fast implementations are compared with."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dycoke_core.compression.counts import reference_frames
from dycoke_core.config import TtmVariant
from dycoke_core.model.adapter import VideoLanguageModel


def share(rate: float, count: int) -> int:
    return math.floor(round((1 - rate) * count, 9))


def distance(a: Tensor, b: Tensor) -> float:
    """Squared distance of unit vectors, in float64."""
    a, b = a.double(), b.double()
    a = a / max(float(a.square().sum().sqrt()), 1e-12)
    b = b / max(float(b.square().sum().sqrt()), 1e-12)
    return float((a - b).square().sum())


def ttm(features: Tensor, k: float) -> list[int]:
    """Stage I over windows of four: f1 against f0, f3 against f2, f2 against f0."""
    num_frames, num_tokens, _ = features.shape
    kept: list[int] = []
    for start in range(0, num_frames, 4):
        for place, against in ((0, None), (1, 0), (2, 0), (3, 2)):
            frame = start + place
            if frame >= num_frames:
                continue
            if against is None:
                survivors = list(range(num_tokens))
            else:
                changes = [
                    distance(features[frame, n], features[start + against, n])
                    for n in range(num_tokens)
                ]
                order = sorted(range(num_tokens), key=lambda n: (-changes[n], n))
                survivors = sorted(order[: share(k, num_tokens)])
            kept += [frame * num_tokens + n for n in survivors]
    return kept


def ttm_by_frames(features: Tensor, k: float, window: int, variant: TtmVariant) -> list[int]:
    """Stage I frame by frame, with the arithmetic of `ttm.select_tokens`: equal to the last bit."""
    num_tokens = features.shape[1]
    kept: list[int] = []
    references = reference_frames(len(features), window=window, variant=variant)
    for frame, reference in references.items():
        survivors = list(range(num_tokens))
        if reference is not None:
            difference = _units(features[frame]) - _units(features[reference])
            changes = difference.square().sum(dim=-1)
            order = changes.sort(descending=True, stable=True).indices.tolist()
            survivors = order[: share(k, num_tokens)]
            if variant == "paper":
                survivors.sort()
        kept += [frame * num_tokens + n for n in survivors]
    return kept


def _units(tokens: Tensor) -> Tensor:
    tokens = tokens.double()
    return tokens / tokens.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)


def vidcom2(features: Tensor, ratio: float) -> list[int]:
    """VidCom2 token by token; features [F, N, D]."""
    num_frames, num_tokens, num_channels = features.shape
    rows = [[features[f, n].double() for n in range(num_tokens)] for f in range(num_frames)]
    everything = torch.stack([row for frame in rows for row in frame])
    spread = [float((c - c.mean()).square().sum()) for c in everything.T]
    quiet = sorted(range(num_channels), key=lambda c: (spread[c], c))[: max(num_channels // 2, 1)]
    units = [[_unit(row[quiet]) for row in frame] for frame in rows]
    centers = [sum(frame) / num_tokens for frame in units]
    video = sum(centers) / num_frames
    like_video = [[_likeness(unit, video) for unit in frame] for frame in units]
    like_frame = [
        [_likeness(unit, center) for unit in frame]
        for frame, center in zip(units, centers, strict=True)
    ]
    budgets = vidcom2_budgets([-sum(x) / num_tokens for x in like_video], num_tokens, ratio)
    kept = []
    for f, budget in enumerate(budgets):
        order = sorted(range(num_tokens), key=lambda n: (like_video[f][n] + like_frame[f][n], n))
        kept += sorted(f * num_tokens + n for n in order[:budget])
    return kept


def vidcom2_budgets(uniqueness: list[float], num_tokens: int, ratio: float) -> list[int]:
    """Frames' budgets: softmax, cap by water-filling, largest remainder."""
    num_frames = len(uniqueness)
    weights = [math.exp((u - max(uniqueness)) / 0.01) for u in uniqueness]
    wanted = [ratio * num_tokens * (1 + w / sum(weights) - 1 / num_frames) for w in weights]
    for _ in range(num_frames):
        surplus = sum(max(w - num_tokens, 0.0) for w in wanted)
        wanted = [min(w, float(num_tokens)) for w in wanted]
        rooms = [f for f in range(num_frames) if wanted[f] < num_tokens]
        for f in rooms:
            wanted[f] += surplus / len(rooms)
    budgets = [math.floor(w) for w in wanted]
    order = sorted(range(num_frames), key=lambda f: (-round(wanted[f] - budgets[f], 9), f))
    left = math.floor(round(ratio * num_frames * num_tokens, 9)) - sum(budgets)
    for f in [f for f in order if budgets[f] < num_tokens][:left]:
        budgets[f] += 1
    return budgets


def _unit(row: Tensor) -> Tensor:
    return row / max(float(row.square().sum().sqrt()), 1e-12)


def _likeness(row: Tensor, center: Tensor) -> float:
    squared = float((row - center).square().sum())
    return sum(math.exp(-squared / (2 * width)) for width in (0.125, 0.25, 0.5, 1.0, 2.0))


def highest(scores: Tensor, num_kept: int, step: int) -> list[int]:
    """Places of the highest scores; among equals the lower index wins."""
    order = sorted(range(len(scores)), key=lambda place: (-float(scores[place]), place))
    return sorted(order[:num_kept])


def lowest(scores: Tensor, num_kept: int, step: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda place: (float(scores[place]), place))
    return sorted(order[:num_kept])


@dataclass(frozen=True)
class SlowStep:
    """A decode step's selection.

    is_borderline: whether rounding may decide otherwise: two scores at the cut, or the cosine and
        the threshold, are within 1e-5.
    """

    kept: list[int]
    num_refreshes: int
    is_borderline: bool


class SlowStageTwo:
    """A `LayerAttention` that keeps every key and value of every token and attends by loops.

    Args:
        visual: positions of the visual tokens in the prompt.
        layer: L; p: share of the visual tokens hidden in decode steps.
        threshold: None: the first selection stays.
        choose: (scores, number kept, decode step) → places among the visual tokens.
    """

    def __init__(
        self,
        visual: list[int],
        *,
        layer: int,
        p: float,
        threshold: float | None,
        choose: Callable[[Tensor, int, int], list[int]] = highest,
    ) -> None:
        self.visual, self.first_pruned, self.threshold = visual, layer, threshold
        self.choose = choose
        self.steps: list[SlowStep] = []
        self.num_kept = share(p, len(visual))
        self.keys: dict[int, list[Tensor]] = {}  # per layer, per token: [G, E]
        self.values: dict[int, list[Tensor]] = {}
        self.is_decoding = False
        self.reference: Tensor | None = None
        self.kept: list[int] = []  # places among the visual tokens
        self.num_refreshes = 0

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        keys, values = self.keys.setdefault(layer, []), self.values.setdefault(layer, [])
        outputs = []
        for token in range(query.shape[2]):
            keys.append(key[0, :, token])
            values.append(value[0, :, token])
            everything = list(range(len(keys)))
            if self.is_decoding and layer == max(self.first_pruned - 1, 0):
                self.select(weights(query[0, :, token], keys, everything, scaling))
            allowed = everything
            if self.is_decoding and layer >= self.first_pruned:
                hidden = set(self.visual) - {self.visual[place] for place in self.kept}
                allowed = [position for position in everything if position not in hidden]
            per_head = weights(query[0, :, token], keys, allowed, scaling)  # [H, allowed]
            stacked = torch.stack([values[position] for position in allowed])  # [allowed, G, E]
            group = query.shape[1] // stacked.shape[1]
            outputs.append(
                torch.stack([per_head[h] @ stacked[:, h // group] for h in range(len(per_head))])
            )
        return torch.stack(outputs)[None]

    def select(self, per_head: Tensor) -> None:
        scores = per_head.mean(dim=0)[self.visual]
        is_borderline = self.update(scores)
        self.steps.append(SlowStep(self.kept, self.num_refreshes, is_borderline))

    def update(self, scores: Tensor) -> bool:
        """Returns whether rounding may decide otherwise."""
        is_near_gate = False
        if self.reference is not None:
            if self.threshold is None:
                return False
            norms = float(scores.norm() * self.reference.norm())
            cosine = float(scores @ self.reference) / norms if norms > 0 else -2.0
            is_near_gate = abs(cosine - self.threshold) < 1e-5
            if cosine >= self.threshold:
                return is_near_gate
            self.num_refreshes += 1
        self.kept = self.choose(scores, self.num_kept, len(self.steps))
        self.reference = scores
        return is_near_gate or is_near_cut(scores, set(self.kept))


def is_near_cut(scores: Tensor, kept: set[int]) -> bool:
    """Whether a score that was kept is within 1e-5 of one that was not."""
    is_kept = torch.tensor([place in kept for place in range(len(scores))], dtype=torch.bool)
    inside, outside = scores[is_kept][:, None], scores[~is_kept][None]
    return bool(((inside - outside).abs() <= 1e-5 * inside.maximum(outside)).any())


def weights(query: Tensor, keys: list[Tensor], positions: list[int], scaling: float) -> Tensor:
    """Softmax of one query, [H, E], over the keys at `positions`: float32 [H, len(positions)]."""
    stacked = torch.stack([keys[position] for position in positions])  # [allowed, G, E]
    group = query.shape[0] // stacked.shape[1]
    rows = [stacked[:, head // group] @ query[head] * scaling for head in range(query.shape[0])]
    return torch.stack(rows).float().softmax(dim=-1)


@torch.inference_mode()
def decode_slowly(
    model: VideoLanguageModel,
    embeds: Tensor,
    answer: list[int],
    attention: SlowStageTwo,
    positions: Tensor | None = None,
    layer_adds: Tensor | None = None,
) -> list[Tensor]:
    """Runs a prompt, then forces an answer through: logits per token.

    Args:
        positions: int64 [axes, P]; None: they count along the prompt.
        layer_adds: [layers, P, D], what the first layers add.
    """
    if positions is None:
        positions = torch.arange(len(embeds))[None]
    hidden = model.forward(embeds, positions, attention, layer_adds)
    attention.is_decoding = True
    logits = [model.logits(hidden[-1:])[0]]
    for index, token in enumerate(answer[:-1]):
        position = torch.full((len(positions), 1), int(positions[0, -1]) + 1 + index)
        hidden = model.forward(model.embed_tokens((token,)), position, attention)
        logits.append(model.logits(hidden[-1:])[0])
    return logits
