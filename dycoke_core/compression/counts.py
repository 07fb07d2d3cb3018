"""How many tokens a share of tokens is. Standard library only."""

import math


def share_of(share: float, count: int) -> int:
    """floor(share * count), safe from binary fractions: plain floats give 295 for 0.1 * 2960."""
    return math.floor(round(share * count, 9))
