"""VidCom2, a stage I by other authors: frames that stand out keep more tokens.

Like TTM it uses no attention and does not see the question, so its prefixes are shared too. It
compares tokens with the centre of the video and of their frame; TTM compares neighbours in time.
"""

import math

import torch
from torch import Tensor

from dycoke_core.compression.counts import share_of

_TEMPERATURE = 0.01  # of the softmax over frames
_KERNEL_WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
_EPSILON = 1e-12  # of a norm


def select_tokens(features: Tensor, retained_ratio: float) -> Tensor:
    """Picks the tokens that are least like the video and their own frame.

    1. A token's likeness to a centre is a sum of Gaussian kernels of their distance, on unit
       vectors over the half of the channels that varies least.
    2. A frame stands out by its mean unlikeness to the video's centre; a sharp softmax over frames
       moves the share that a frame keeps: R (1 + softmax - 1 / F).
    3. Each frame keeps the tokens that are least like the video's centre and the frame's together.

    Args:
        features: [F, N, D], any float dtype, F >= 1.
        retained_ratio: R, share of all tokens that stays, in [0, 1].

    Returns:
        int64 [V], ascending indices into the F * N tokens. Waits for the device: the frames'
        budgets are divided on the host.

    Raises:
        ValueError: features of another rank or without a frame, or a ratio outside [0, 1].

    Source: Liu et al., "Video Compression Commander", EMNLP 2025, arXiv 2505.14454: frame
        compression adjustment and adaptive token compression; channels, kernels and temperature
        as in the authors' release.
    Deviation: exactly floor(R F N) tokens are kept, so that the count is known before encoding:
        budgets are rounded by largest remainder, and what exceeds a whole frame goes to the others.
        The release rounds each frame on its own and keeps at least one token of each.
        Computed in float64, ties by lower index.
    """
    if features.ndim != 3 or features.shape[0] == 0:
        raise ValueError("features must be [F, N, D] with at least one frame")
    num_frames, tokens_per_frame, _ = features.shape
    num_kept = count_tokens(num_frames, tokens_per_frame, retained_ratio)
    to_video, to_frame = _likenesses(features[..., _quiet_channels(features)])
    budgets = frame_budgets(
        (-to_video.mean(dim=1)).tolist(), tokens_per_frame, retained_ratio, num_kept
    )
    order = (to_video + to_frame).sort(dim=1, stable=True).indices
    kept = [
        frame * tokens_per_frame + order[frame, :budget].sort().values
        for frame, budget in enumerate(budgets)
    ]
    return torch.cat(kept)


def count_tokens(num_frames: int, tokens_per_frame: int, retained_ratio: float) -> int:
    """How many tokens `select_tokens` returns."""
    if not 0.0 <= retained_ratio <= 1.0:
        raise ValueError("retained_ratio must be between 0 and 1")
    return share_of(retained_ratio, num_frames * tokens_per_frame)


def frame_budgets(
    uniqueness: list[float], tokens_per_frame: int, retained_ratio: float, num_kept: int
) -> list[int]:
    """Divides `num_kept` tokens among frames, more to those that stand out.

    Args:
        uniqueness: per frame.

    Returns:
        Tokens per frame: none above `tokens_per_frame`, `num_kept` in sum.
    """
    num_frames = len(uniqueness)
    highest = max(uniqueness)
    weights = [math.exp((u - highest) / _TEMPERATURE) for u in uniqueness]
    shares = [retained_ratio * (1 + w / sum(weights) - 1 / num_frames) for w in weights]
    wanted = _capped([share * tokens_per_frame for share in shares], tokens_per_frame)
    budgets = [math.floor(tokens) for tokens in wanted]
    by_remainder = sorted(
        range(num_frames), key=lambda frame: (round(budgets[frame] - wanted[frame], 9), frame)
    )
    open_frames = [frame for frame in by_remainder if budgets[frame] < tokens_per_frame]
    for frame in open_frames[: num_kept - sum(budgets)]:
        budgets[frame] += 1
    return budgets


def _capped(wanted: list[float], cap: int) -> list[float]:
    """Cuts each value to `cap`; the excess goes in equal parts to frames with room."""
    total = sum(wanted)
    while max(wanted) > cap:
        wanted = [min(tokens, cap) for tokens in wanted]
        num_open = sum(tokens < cap for tokens in wanted)
        missing = total - sum(wanted)
        if not num_open or missing < 1e-9:
            break
        wanted = [tokens + missing / num_open if tokens < cap else tokens for tokens in wanted]
    return wanted


def _quiet_channels(features: Tensor) -> Tensor:
    """The half of the channels that varies least over all tokens: int64 [max(D // 2, 1)]."""
    num_tokens = features.shape[0] * features.shape[1]
    # A frame at a time: float64 copies of a whole video would be its largest tensors.
    mean = torch.stack([frame.double().sum(dim=0) for frame in features]).sum(dim=0) / num_tokens
    spread = torch.stack([(frame.double() - mean).square().sum(dim=0) for frame in features])
    order = spread.sum(dim=0).sort(stable=True).indices
    return order[: max(features.shape[-1] // 2, 1)]


def _likenesses(features: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's likeness to the video's centre and to its frame's: float64 [F, N] each."""
    frame_centers = torch.stack([_unit(frame).mean(dim=0) for frame in features])
    video_center = frame_centers.mean(dim=0)
    to_video = [_kernels(_unit(frame), video_center) for frame in features]
    to_frame = [
        _kernels(_unit(f), center) for f, center in zip(features, frame_centers, strict=True)
    ]
    return torch.stack(to_video), torch.stack(to_frame)


def _kernels(tokens: Tensor, center: Tensor) -> Tensor:
    """[N, D] and [D] → [N]."""
    distances = (tokens - center).square().sum(dim=-1)
    return torch.stack([(-distances / (2 * width)).exp() for width in _KERNEL_WIDTHS]).sum(dim=0)


def _unit(tokens: Tensor) -> Tensor:
    tokens = tokens.double()
    return tokens / tokens.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(_EPSILON)
