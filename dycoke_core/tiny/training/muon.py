"""Muon: momentum whose update is made orthogonal, for the matrices of hidden layers.

Source: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with
    the scale 0.2 * sqrt(longer side) of Moonlight (2025), which makes its step as large as AdamW's.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_STEPS = 5  # of the Newton-Schulz iteration
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.flatten(1).shape)].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                step = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for parameter, update in zip(parameters, orthogonal(updates), strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"])
                    parameter.sub_(update.view_as(parameter), alpha=step)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's: the gradient, drawn towards its running mean."""
        assert parameter.grad is not None
        gradient = parameter.grad.flatten(1)
        state = self.state[parameter]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(gradient)
        mean: Tensor = state["mean"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """[count, rows, columns] → the same with singular values near 1, singular vectors kept."""
    x = matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / (x.float().flatten(1).norm(dim=1)[:, None, None] + 1e-7).bfloat16()
    for _ in range(_STEPS):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * square @ square) @ x
    result: Tensor = x.mT if is_tall else x
    return result.float()
