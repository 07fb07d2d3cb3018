"""Stage-I controls: ways to keep as many tokens as TTM without looking at the video.

They show what TTM is worth: they cost the language model the same, but do not know what moves. The
stage-II controls are in `dycoke_core.compression.kv_pruning`.
"""

import torch
from torch import Tensor

from dycoke_core.compression import ttm
from dycoke_core.compression.counts import fewer_frames, reference_frames, share_of
from dycoke_core.compression.randomness import random_order
from dycoke_core.transfer import to_device


def select_random_tokens(features: Tensor, k: float, *, window: int = 4, seed: int = 0) -> Tensor:
    """Picks as many tokens of each frame as TTM does, at random where TTM prunes.

    The draw depends on the seed and the frame's number, not on the features: two videos of the same
    shape lose the same places under the same seed.

    Args:
        features: [F, N, D], F >= 1.
        k, window: TTM's.

    Returns:
        int64 [V], ascending indices into the F * N tokens.

    Source: paper Table 5, "Random Pruning".
    Deviation: the paper does not say what is random; here it is stage I's choice.
    """
    num_frames, tokens_per_frame, _ = features.shape
    num_kept = share_of(1.0 - k, tokens_per_frame)
    references = reference_frames(num_frames, window=window)
    no_orders = torch.empty(0, tokens_per_frame, dtype=torch.long, device=features.device)
    orders = [
        random_order(seed, frame, tokens_per_frame, features.device).unsqueeze(0)
        for frame, reference in references.items()
        if reference is not None
    ]
    survivors = torch.cat([no_orders, *orders])[:, :num_kept].sort(dim=1).values
    return ttm.assemble(references, survivors, tokens_per_frame)


def select_fewer_frames(features: Tensor, k: float, *, window: int = 4) -> Tensor:
    """Keeps whole frames, evenly spread: as many as come closest to TTM's number of tokens.

    Frames stay whole, as when a user asks for fewer of them, so the count is TTM's to within half a
    frame: 15 of 32 at k = 0.7 (2940 tokens against 2960 at N = 196). At least one stays. They are
    the ones that LLaVA would sample if these F frames were the video.

    Args:
        features: [F, N, D], F >= 1.
        k, window: TTM's.

    Returns:
        int64 [V], ascending indices into the F * N tokens.

    Source: DYCOKE "Controls and baselines"; the spread is LLaVA-OneVision's frame sampling.
    """
    num_frames, tokens_per_frame, _ = features.shape
    frames = torch.tensor(fewer_frames(num_frames, tokens_per_frame, k, window=window))
    firsts = to_device(frames * tokens_per_frame, features.device)
    places = torch.arange(tokens_per_frame, device=features.device)
    return (firsts.unsqueeze(1) + places).flatten()
