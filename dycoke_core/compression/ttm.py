"""Stage I, temporal token merging: drops tokens that repeat an earlier frame.

It takes the features of a video in the form that the language model gets, before a newline, marker
or time is put next to them. A frame here means a unit of the model: a frame, or several that become
one set of tokens. It does not see the question, so every question about a video gets the same
tokens. "Merging" is the paper's word; nothing is averaged.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dycoke_core.compression.counts import checked_share, reference_frames, share_of
from dycoke_core.config import TtmVariant
from dycoke_core.transfer import to_device

# Features are compared in blocks of at most this many values, three float64 tensors at a time. On a
# GPU each operation costs a launch: 64 frames of a 7B model are one block of 1.1 GB (32 frames, of
# which 24 are compared: 0.4 GB). On a CPU a block of 1 MB, often a single frame, stays in a core's
# cache; 8 MB took 1.5 times as long, all frames at once 3 to 4 times.
_BLOCK_VALUES = 3 * 2**24
_BLOCK_VALUES_ON_CPU = 2**17

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
    num_kept = share_of(1.0 - checked_share(k), tokens_per_frame)
    survivors = _rank_by_change(features, references)[:, :num_kept]
    if variant == "paper":
        survivors = survivors.sort(dim=1).values
    return assemble(references, survivors, tokens_per_frame)


def assemble(
    references: Mapping[int, int | None], survivors: Tensor, tokens_per_frame: int
) -> Tensor:
    """Joins the tokens of whole and pruned frames, in the order of the frames.

    Args:
        references: `reference_frames`.
        survivors: int64 [pruned frames, m], places in their frames.

    Returns:
        int64 [V], indices into the F * N tokens.
    """
    whole, firsts_of_whole, pruned, firsts_of_pruned = [], [], [], []
    num_kept, num_tokens = survivors.shape[1], 0
    for frame, reference in references.items():
        if reference is None:
            whole.append(frame * tokens_per_frame)
            firsts_of_whole.append(num_tokens)
            num_tokens += tokens_per_frame
        else:
            pruned.append(frame * tokens_per_frame)
            firsts_of_pruned.append(num_tokens)
            num_tokens += num_kept
    columns = (whole, firsts_of_whole, pruned, firsts_of_pruned)
    whole_at, to_whole, pruned_at, to_pruned = (
        column.unsqueeze(1) for column in _columns(columns, survivors.device)
    )
    places = torch.arange(tokens_per_frame, device=survivors.device)
    kept = torch.empty(num_tokens, dtype=torch.long, device=survivors.device)
    kept[to_whole + places] = whole_at + places
    kept[to_pruned + places[:num_kept]] = pruned_at + survivors
    return kept


def _rank_by_change(features: Tensor, references: Mapping[int, int | None]) -> Tensor:
    """Places of each pruned frame's tokens, the most changed first: int64 [pruned frames, N].

    Ties by lower index.
    """
    compared = [(frame, r) for frame, r in references.items() if r is not None]
    if not compared:
        return torch.empty(0, features.shape[1], dtype=torch.long, device=features.device)
    frames, against = _columns(
        ([f for f, _ in compared], [r for _, r in compared]), features.device
    )
    limit = _BLOCK_VALUES_ON_CPU if features.device.type == "cpu" else _BLOCK_VALUES
    block = max(1, limit // max(1, features[0].numel()))  # frames
    changes = [
        _changes(features, frames[first : first + block], against[first : first + block])
        for first in range(0, len(compared), block)
    ]
    return torch.cat(changes).sort(dim=1, descending=True, stable=True).indices


def _changes(features: Tensor, frames: Tensor, against: Tensor) -> Tensor:
    """How much each token differs from its reference: float64 [frames, N]."""
    difference = _unit(features.index_select(0, frames))
    difference -= _unit(features.index_select(0, against))
    return difference.square_().sum(dim=-1)


def _unit(tokens: Tensor) -> Tensor:
    """Unit vectors in float64; overwrites float64 tokens."""
    tokens = tokens.double()
    norms = tokens.square().sum(dim=-1, keepdim=True).sqrt_().clamp_min_(_EPSILON)
    return tokens.div_(norms)


def _columns(columns: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Each column as int64 [n], sent in one copy that the host does not wait for."""
    flat = to_device(torch.tensor([n for column in columns for n in column]).long(), device)
    return list(torch.split(flat, [len(column) for column in columns]))
