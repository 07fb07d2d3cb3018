"""Chooses the next token. Stateless: token i's random number depends on the seed and i alone, so
an answer that goes on elsewhere draws the numbers it would have drawn here."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dycoke_core.errors import EngineError
from dycoke_core.sequence import SamplingParams


def sample(logits: Tensor, params: Sequence[SamplingParams], indices: Sequence[int]) -> list[int]:
    """Chooses the next token of each answer.

    Args:
        logits: float32 [rows, vocabulary].
        indices: of the tokens in their answers.

    Returns:
        Token ids. Waits for the device, once for all greedy rows and again for each row that is
        drawn: the host needs them to detokenize.

    Raises:
        EngineError: logits that are not finite, as after an overflow: no token would mean anything.
    """
    best = logits.max(dim=-1)  # a NaN, where a row has one
    greatest, greedy = torch.stack([best.values.double(), best.indices.double()]).tolist()
    if not all(math.isfinite(logit) for logit in greatest):
        raise EngineError("the model's logits are not finite")
    chosen = [int(token_id) for token_id in greedy]
    for row, (sampling, index) in enumerate(zip(params, indices, strict=True)):
        if sampling.temperature > 0.0:
            chosen[row] = draw(logits[row], sampling, index)
    return chosen


def draw(logits: Tensor, params: SamplingParams, index: int) -> int:
    """Draws token `index` of an answer from float32 [vocabulary], at a temperature above 0."""
    scaled = (logits.double() - logits.max()) / params.temperature
    probabilities = scaled.softmax(dim=-1)
    ordered, ids = probabilities.sort(descending=True, stable=True)
    cumulative = ordered.cumsum(dim=-1)
    # The nucleus: tokens before which less than top_p has been summed up; never empty.
    num_candidates = (cumulative - ordered < params.top_p).sum()
    last = (num_candidates - 1).view(1)
    target = uniform(params.seed, index) * cumulative.index_select(0, last)
    place = torch.searchsorted(cumulative, target, right=True).minimum(last)
    return int(ids.index_select(0, place))


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from 53 bits of a hash of (seed, index)."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53
