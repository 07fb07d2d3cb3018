"""Copies from the host to a device that the host does not wait for."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on the device, by way of pinned memory; itself on a CPU."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)
