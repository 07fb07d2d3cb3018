"""Chooses the next token. Stateless: token i's random number depends on the seed and i alone, so
an answer that goes on elsewhere draws the numbers it would have drawn here."""

import hashlib

import torch
from torch import Tensor

from dycoke_core.sequence import SamplingParams


def sample(logits: Tensor, params: SamplingParams, index: int) -> int:
    """Draws token `index` of an answer.

    Args:
        logits: float32 [vocabulary].

    Returns:
        The token's id. Waits for the device: the host needs the id to detokenize.
    """
    if params.temperature == 0.0:
        return int(logits.argmax())
    probabilities = (logits.double() / params.temperature).softmax(dim=-1)
    ordered, ids = probabilities.sort(descending=True, stable=True)
    cumulative = ordered.cumsum(dim=-1)
    # The nucleus: tokens before which less than top_p has been summed up; never empty.
    num_candidates = (cumulative - ordered < params.top_p).sum()
    total = cumulative[num_candidates - 1]
    draw = uniform(params.seed, index) * total
    place = torch.searchsorted(cumulative, draw, right=True).clamp(max=num_candidates - 1)
    return int(ids[place])


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from 53 bits of a hash of (seed, index)."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53
