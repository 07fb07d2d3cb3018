"""Copies between host and device that the host does not wait for."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on the device, by way of pinned memory; itself on a CPU."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A device's tensor on its way to the host.

    A reader that comes once the device has finished later work does not wait.
    """

    def __init__(self, values: Tensor) -> None:
        is_on_gpu = values.device.type == "cuda"
        self._copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=is_on_gpu)
        self._copy.copy_(values, non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if is_on_gpu:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._copy
