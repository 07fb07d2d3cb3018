"""Chooses the next tokens, without a sort of the vocabulary and without waiting for the device.

Stateless: token i's random number depends on the seed and i alone, so an answer that is resumed
elsewhere draws the numbers that it would have drawn here. `dycoke_core.gpu_kernels.sampling`
computes the same definition on a GPU. `SAMPLER_VERSION` names the definition: a change that could
give a seeded answer another token raises it.

The definition, for logits l of one row:

- Temperature 0, also after rounding to float32: the largest logit, ties to the lower index.
- Otherwise token i weighs w[i] = exp((l[i] - max(l)) / temperature), in float32; sums of weights
  are float64.
- The nucleus, for top_p < 1: the highest threshold t such that the tokens with w[i] >= t hold at
  least top_p of the sum of all. Every token with w[i] >= t is a candidate, so ties at the threshold
  are all in. With top_p = 1 every token of positive weight is a candidate.
- The draw: the first candidate, in the order of the vocabulary, at which the running sum of the
  candidates' weights exceeds uniform * (their sum); the last candidate if rounding leaves none.

Two devices agree unless the number drawn falls within rounding of a boundary between two tokens, or
the nucleus's sum within rounding of top_p.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dycoke_core.sequence import SamplingParams
from dycoke_core.transfer import to_device

# Rows are drawn in blocks of about this many logits (6 rows of a vocabulary of 152 thousand): some
# 40 MB of working memory, mostly float64. Larger blocks were slower on a CPU (2.4 ms a row; 3.9 at
# 2**21), smaller ones no faster.
BLOCK_LOGITS = 2**20

# Weights are at most 1, so they have 30 significant bits; the search reads ten of them per pass.
_DIGIT_BITS = 10
_NUM_DIGITS = 2**_DIGIT_BITS
_SHIFTS = (20, 10, 0)


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row's token is chosen."""

    temperature: float  # 0 = greedy
    top_p: float  # in (0, 1]
    uniform: float  # in [0, 1)

    @classmethod
    def of_token(cls, params: SamplingParams, index: int) -> "Draw":
        """For token `index` of an answer."""
        is_greedy = params.temperature == 0.0
        number = 0.0 if is_greedy else uniform(params.seed, index)
        return cls(params.temperature, params.top_p, number)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of a step, on the logits' device.

    Args:
        ids: int64 [rows]; 0 where a row is not finite.
        is_finite: bool [rows]. False where the largest logit is NaN or infinite, as after an
            overflow: no token would mean anything.
    """

    ids: Tensor
    is_finite: Tensor


def sample(logits: Tensor, draws: Sequence[Draw]) -> Sampled:
    """Chooses one token per row; the choice does not depend on the other rows.

    Args:
        logits: [rows, vocabulary], any float dtype.
        draws: one per row.

    Returns:
        Ids and flags. Does not wait for the device: whether any row is drawn is known on the host.
    """
    assert len(draws) == len(logits)
    best = logits.max(dim=-1)  # the first of equals; NaN if the row contains one
    is_finite = best.values.isfinite()
    ids = best.indices
    drawn = [row for row, draw in enumerate(draws) if draw.temperature > 0.0]
    if drawn:
        rows = to_device(torch.tensor(drawn), logits.device)
        settings = torch.tensor(
            [(draws[row].temperature, draws[row].top_p, draws[row].uniform) for row in drawn],
            dtype=torch.float64,
        )
        settings = to_device(settings, logits.device)
        has_nucleus = any(draws[row].top_p < 1.0 for row in drawn)
        block = max(1, BLOCK_LOGITS // logits.shape[-1])
        picked = []
        for first in range(0, len(drawn), block):
            here = slice(first, first + block)
            picked.append(_draw(logits[rows[here]].float(), settings[here], has_nucleus))
        ids = ids.index_copy(0, rows, torch.cat(picked))
    return Sampled(ids.where(is_finite, 0), is_finite)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from 53 bits of a hash of (seed, index)."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def _draw(logits: Tensor, settings: Tensor, has_nucleus: bool) -> Tensor:
    """Draws from float32 [rows, vocabulary]: int64 [rows].

    Args:
        settings: float64 [rows, 3]: temperature, top_p, uniform.
        has_nucleus: whether any top_p is below 1.
    """
    temperature, top_p, number = settings.unsqueeze(-1).unbind(dim=1)  # [rows, 1] each
    best = logits.max(dim=-1, keepdim=True)
    temperature = temperature.float()
    is_greedy = temperature == 0.0  # may be 0 after rounding to float32
    temperature = temperature.clamp_min(torch.finfo(torch.float32).tiny)
    weights = ((logits - best.values) / temperature).exp()
    bits = weights.view(torch.int32)  # weights are not negative, so their bits have the same order
    weights = weights.double()
    threshold: Tensor | int = 1  # the least positive weight
    if has_nucleus:
        top_p = top_p.float().double()  # as on the GPU
        threshold = torch.where(top_p < 1.0, _nucleus_threshold(weights, bits, top_p), 1)
    is_candidate = bits >= threshold
    running = weights.where(is_candidate, 0.0).cumsum(dim=-1)
    place = (running <= number * running[:, -1:]).sum(dim=-1, keepdim=True)
    places = torch.arange(logits.shape[-1], device=logits.device)
    last = places.where(is_candidate, 0).amax(dim=-1, keepdim=True)
    return torch.where(is_greedy, best.indices, place.minimum(last)).squeeze(1)


def _nucleus_threshold(weights: Tensor, bits: Tensor, top_p: Tensor) -> Tensor:
    """The bits of the least weight in the nucleus: int32 [rows, 1].

    Each pass sums the weights by the next ten bits below those already known, which costs less than
    one pass for every bit.
    """
    goal = (top_p * weights.sum(dim=-1, keepdim=True)).clamp_min(1e-300)  # never an empty nucleus
    low = torch.zeros_like(goal, dtype=torch.int32)
    above = torch.zeros_like(goal)  # the sum of what exceeds the digits that are being looked at
    for shift in _SHIFTS:
        digits = (bits - low) >> shift
        digits = digits.where((digits >= 0) & (digits < _NUM_DIGITS), _NUM_DIGITS).long()
        sums = weights.new_zeros(len(weights), _NUM_DIGITS + 1).scatter_add_(1, digits, weights)
        sums[:, -1:] = above
        at_least = sums.flip(-1).cumsum(dim=-1).flip(-1)  # column n: digit >= n, and `above`
        digit = ((at_least[:, :-1] >= goal).sum(dim=-1, keepdim=True) - 1).clamp_min(0)
        above = at_least.gather(1, digit + 1)
        low = low + (digit.int() << shift)
    return low
