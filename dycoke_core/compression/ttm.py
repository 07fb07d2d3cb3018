"""Stage I, temporal token merging: drops what a frame repeats of an earlier one.

Works on the pooled, projected features of a video before the newline embedding is added, knows
nothing of the question, and so gives the same tokens for every question about a video. "Merging" is
the paper's word; nothing is averaged.
"""

import torch
from torch import Tensor

from dycoke_core.compression.counts import share_of
from dycoke_core.config import TtmVariant

_EPSILON = 1e-12  # of a norm, as in torch.nn.functional.normalize


def select_tokens(
    features: Tensor, k: float, *, window: int = 4, variant: TtmVariant = "paper"
) -> Tensor:
    """Picks the visual tokens that stage I keeps.

    Every window's first frame stays whole. Each other frame keeps the floor((1 - k) * N) tokens
    that differ most from the token at the same place in its reference: the frame before for odd
    places in the window, two frames before for even ones. References are the original features,
    pruned or not.

    Args:
        features: [F, N, D], any float dtype, F >= 1.
        k: share of the tokens of a pruned frame that is dropped, in [0, 1].
        window: frames per window.
        variant: "released" gives the counts and the order of the authors' code, which leaves the
            third frame of the last window whole, drops the last of an odd number of frames, and
            sorts a pruned frame's survivors by similarity.

    Returns:
        int64 [V], indices into the F * N tokens; ascending for "paper".

    Raises:
        ValueError: features of another rank or without a frame, k outside [0, 1], window below 1,
            or "released" with fewer than 5 frames or a window other than 4.

    Source: paper section 3.2, DYCOKE "Stage I".
    Deviation: ranks by the squared distance of unit vectors in float64 instead of the cosine in the
        features' dtype: the same order, but exact where frames are nearly identical.
    """
    if features.ndim != 3 or features.shape[0] == 0:
        raise ValueError("features must be [F, N, D] with at least one frame")
    num_frames, tokens_per_frame, _ = features.shape
    references = reference_frames(num_frames, window=window, variant=variant)
    num_kept = share_of(1.0 - _checked_share(k), tokens_per_frame)
    pruned = [frame for frame, reference in references.items() if reference is not None]
    kept = {frame: torch.arange(tokens_per_frame, device=features.device) for frame in references}
    if pruned:
        ranked = _rank_by_change(features, pruned, [references[frame] for frame in pruned])
        survivors = ranked[:, :num_kept]  # [pruned, m]
        if variant == "paper":
            survivors = survivors.sort(dim=1).values
        kept.update(zip(pruned, survivors.unbind(), strict=True))
    return torch.cat([frame * tokens_per_frame + kept[frame] for frame in references])


def count_tokens(
    num_frames: int,
    tokens_per_frame: int,
    k: float,
    *,
    window: int = 4,
    variant: TtmVariant = "paper",
) -> int:
    """The length of what `select_tokens` returns, known before a frame is encoded."""
    references = reference_frames(num_frames, window=window, variant=variant)
    num_pruned = sum(reference is not None for reference in references.values())
    num_kept = share_of(1.0 - _checked_share(k), tokens_per_frame)
    return (len(references) - num_pruned) * tokens_per_frame + num_pruned * num_kept


def reference_frames(
    num_frames: int, *, window: int = 4, variant: TtmVariant = "paper"
) -> dict[int, int | None]:
    """Maps each frame to the one that it is compared with, None for a frame that stays whole."""
    if variant == "released":
        return _released_references(num_frames, window)
    if window < 1:
        raise ValueError("window must be at least 1")
    return {frame: _reference(frame, window) for frame in range(num_frames)}


def _reference(frame: int, window: int) -> int | None:
    place = frame % window
    if place == 0:
        return None
    return frame - 1 if place % 2 else frame - 2


def _released_references(num_frames: int, window: int) -> dict[int, int | None]:
    if window != 4 or num_frames < 5:
        raise ValueError("the released variant needs windows of 4 frames and at least 5 frames")
    references = {frame: _reference(frame, window) for frame in range(num_frames - num_frames % 2)}
    for frame in references:
        if frame % 4 == 2 and frame - 2 >= num_frames - 4:
            references[frame] = None
    return references


def _rank_by_change(features: Tensor, frames: list[int], references: list[int | None]) -> Tensor:
    """Places of each frame's tokens, the most changed first, ties by lower index: [frames, N].

    One frame at a time in float64 bounds the working memory to a few N * D doubles; the loop runs
    over frames, never over tokens.
    """
    changes = []
    for frame, reference in zip(frames, references, strict=True):
        difference = _unit(features[frame]) - _unit(features[reference])
        changes.append(difference.square_().sum(dim=-1))
    return torch.stack(changes).sort(dim=1, descending=True, stable=True).indices


def _unit(tokens: Tensor) -> Tensor:
    tokens = tokens.double()
    return tokens / tokens.square().sum(dim=-1, keepdim=True).sqrt().clamp_min_(_EPSILON)


def _checked_share(k: float) -> float:
    if not 0.0 <= k <= 1.0:
        raise ValueError("k must be between 0 and 1")
    return k
