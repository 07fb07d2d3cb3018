"""The sampler's definition in plain Python loops: what the fast implementations are compared with.

Sums of the candidates run in the order of the vocabulary; those of the nucleus are ordered by
weight, so a top_p within rounding of such a sum may give another nucleus.
"""

import itertools
import math

import torch
from torch import Tensor

from dycoke_core.engine.sampler import Draw


def weigh(logits: Tensor, temperature: float) -> list[float]:
    """The weights of one row, in float32 as the sampler's, as Python floats."""
    scaled = (logits.float() - logits.float().max()) / torch.tensor(temperature).float()
    return [float(weight) for weight in scaled.exp()]


def nucleus(logits: Tensor, temperature: float, top_p: float) -> list[int]:
    """The candidates of one row, in the order of the vocabulary."""
    weights = weigh(logits, temperature)
    top_p = float(torch.tensor(top_p).float())
    threshold = min(weight for weight in weights if weight > 0)
    if top_p < 1.0:
        total, mass = math.fsum(weights), 0.0
        for weight, equals in itertools.groupby(sorted(weights, reverse=True)):
            mass, threshold = mass + sum(equals), weight
            if mass >= top_p * total:
                break
    return [token for token, weight in enumerate(weights) if weight >= threshold > 0]


def sample(logits: Tensor, draw: Draw) -> int:
    """Chooses a token from finite logits [vocabulary]."""
    if draw.temperature == 0.0:
        return max(range(len(logits)), key=lambda token: (float(logits[token]), -token))
    weights = weigh(logits, draw.temperature)
    candidates = nucleus(logits, draw.temperature, draw.top_p)
    sums = list(itertools.accumulate(weights[token] for token in candidates))
    target = draw.uniform * sums[-1]
    reached = (token for token, sum_ in zip(candidates, sums, strict=True) if sum_ > target)
    return next(reached, candidates[-1])
