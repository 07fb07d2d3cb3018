"""The optimizer of matrices."""

import pytest
import torch

from dycoke_core.tiny.training.muon import Muon, orthogonal


def test_muon_makes_an_update_orthogonal() -> None:
    matrices = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5 and values.max() < 1.4


def test_singular_vectors_are_kept() -> None:
    left, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    right, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))
    matrix = left @ torch.diag(torch.tensor([5.0, 4.0, 3.0, 3.0, 2.0, 2.0])) @ right.T
    (update,) = orthogonal(matrix[None])
    seen = left.T @ update @ right  # diagonal where both sides' vectors are the same
    assert (seen - torch.diag(seen.diagonal())).abs().max() < 0.05
    tall = orthogonal(matrix[None, :, :3].contiguous())
    wide = orthogonal(matrix[None, :, :3].mT.contiguous())
    torch.testing.assert_close(tall, wide.mT, atol=0.02, rtol=0)


def test_a_step_is_as_long_as_the_rate_and_shape_say_whatever_the_gradient() -> None:
    for scale in (1e-4, 1.0, 1e4):
        weight = torch.nn.Parameter(torch.zeros(8, 32))
        gradient = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
        weight.grad = scale * gradient
        Muon([weight], lr=0.1, weight_decay=0.0).step()
        lengths = torch.linalg.svdvals(weight.detach())
        assert lengths.max() == pytest.approx(0.1 * 0.2 * 32**0.5, rel=0.4)


def test_weights_without_a_gradient_stay_and_others_decay() -> None:
    idle, used = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    used.grad = torch.zeros(4, 4)
    Muon([idle, used], lr=0.5, weight_decay=0.1).step()
    assert torch.equal(idle.detach(), torch.ones(4, 4))
    torch.testing.assert_close(used.detach(), torch.full((4, 4), 0.95))
