"""Random choices that depend only on (seed, counter), never on earlier draws.

So an answer that continues on another worker draws the same numbers as it would have here, and no
request changes another's draws. They are equal on devices of the same kind with the same build of
PyTorch.
"""

import hashlib

import torch
from torch import Tensor


def random_order(seed: int, counter: int, count: int, device: torch.device) -> Tensor:
    """A random order of 0 … count - 1: int64 [count], drawn on the device without waiting for it.

    Args:
        counter: which draw under this seed, such as a frame or a decode step.
    """
    digest = hashlib.blake2b(f"{seed}:{counter}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "big", signed=True))
    return torch.randperm(count, generator=generator, device=device)
