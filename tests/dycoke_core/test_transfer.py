"""Copies between host and device, where both are the CPU."""

import torch

from dycoke_core.transfer import HostCopy, to_device


def test_a_host_copy_is_of_the_moment_at_which_it_was_made() -> None:
    values = torch.arange(6).view(2, 3)
    copy = HostCopy(values)
    values.zero_()
    assert copy.read().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copy.read() is copy.read()


def test_on_a_cpu_nothing_is_copied() -> None:
    values = torch.arange(3)
    assert to_device(values, torch.device("cpu")) is values
