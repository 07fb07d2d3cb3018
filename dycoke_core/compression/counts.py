"""How many visual tokens stay, and from which frames, computed before any token exists. Standard
library only, so that processes without torch can check what fits.
"""

import math

from dycoke_core.config import CompressionConfig, TtmVariant


def count_visual_tokens(config: CompressionConfig, num_frames: int, tokens_per_frame: int) -> int:
    """V: what stage I of a policy lets the language model see of F frames of N tokens.

    Raises:
        ValueError: the policy cannot work on so few frames.
    """
    if config.policy == "full":
        return num_frames * tokens_per_frame
    if config.policy == "vidcom2":
        return share_of(config.retained_ratio, num_frames * tokens_per_frame)
    if config.policy == "fewer_frames":
        kept = fewer_frames(num_frames, tokens_per_frame, config.k, window=config.window)
        return tokens_per_frame * len(set(kept))
    return count_tokens(
        num_frames, tokens_per_frame, config.k, window=config.window, variant=config.variant
    )


def share_of(share: float, count: int) -> int:
    """floor(share * count), safe from binary fractions: plain floats give 295 for 0.1 * 2960."""
    return math.floor(round(share * count, 9))


def fewer_frames(
    num_frames: int, tokens_per_frame: int, k: float, *, window: int = 4
) -> tuple[int, ...]:
    """The frames that `controls.select_fewer_frames` keeps; needs no features."""
    wanted = count_tokens(num_frames, tokens_per_frame, k, window=window)
    num_kept = max(1, (2 * wanted + tokens_per_frame) // (2 * tokens_per_frame))
    return tuple(i * (num_frames - 1) // max(num_kept - 1, 1) for i in range(num_kept))


def count_tokens(
    num_frames: int,
    tokens_per_frame: int,
    k: float,
    *,
    window: int = 4,
    variant: TtmVariant = "paper",
) -> int:
    """The length of what `ttm.select_tokens` returns, known before a frame is encoded."""
    return sum(count_per_frame(num_frames, tokens_per_frame, k, window=window, variant=variant))


def count_per_frame(
    num_frames: int,
    tokens_per_frame: int,
    k: float,
    *,
    window: int = 4,
    variant: TtmVariant = "paper",
) -> tuple[int, ...]:
    """How many of each frame `ttm.select_tokens` keeps; 0 for a frame that "released" drops."""
    references = reference_frames(num_frames, window=window, variant=variant)
    num_kept = share_of(1.0 - checked_share(k), tokens_per_frame)
    counts = {f: tokens_per_frame if r is None else num_kept for f, r in references.items()}
    return tuple(counts.get(frame, 0) for frame in range(num_frames))


def reference_frames(
    num_frames: int, *, window: int = 4, variant: TtmVariant = "paper"
) -> dict[int, int | None]:
    """Maps each frame to the one it is compared with; None for a frame that stays whole."""
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


def checked_share(k: float) -> float:
    if not 0.0 <= k <= 1.0:
        raise ValueError("k must be between 0 and 1")
    return k
