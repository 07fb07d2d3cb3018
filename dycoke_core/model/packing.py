"""Weights of bfloat16 models on a CPU, in the layout that its matrix products read fastest.

PyTorch stores a linear layer's weights row by row and repacks them, or reads them badly, at
every call. Laid out once at loading, a decode step of one row reads them faster (by how much is
measured in `loadtest.engine`: `weight_read_gb_s` against `plain_weight_read_gb_s`). The activations
of an MLP are applied while a product is still in registers, not in passes over memory of their own,
and a long prompt goes through it block by block, so that what lies between its products stays in
the processor's cache, and in memory that the allocator has at hand: in one piece it is tens of
megabytes, which glibc returns to the kernel and faults in again at every call.

transformers' layers stay as they are; only their linear layers and MLPs are exchanged. The packed
weights replace the plain ones, but for a language head that shares its weights with the embedding:
that one is held twice. Packed and plain layers differ by rounding alone.

What is not covered: float32 and float16, where the layout gains nothing; quantized weights.
"""

import math
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

_NO_ACTIVATION = ("none", "")
_SILU = ("swish", "")
_GELU_TANH = ("gelu", "tanh")
_BLOCK_ROWS = 512  # at most, a multiple of _TILE_ROWS
_TILE_ROWS = 32


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has the packed products for a model's device and dtype."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def pack_weights(model: nn.Module) -> None:
    """Exchanges every linear layer and every MLP of a known form for a packed one, in place."""
    for name, child in list(model.named_children()):
        packed = _packed(child)
        if packed is not None:
            setattr(model, name, packed)
        else:
            pack_weights(child)


class PackedLinear(nn.Module):
    """A linear layer, and what follows it in the same pass over its output.

    Args:
        linear: gives weights and bias; keeps no share in the packed copy.
        activation: a name and algorithm of oneDNN's.
    """

    def __init__(self, linear: nn.Linear, activation: tuple[str, str] = _NO_ACTIVATION) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._activation = activation

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        name, algorithm = self._activation
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, name, [], algorithm
        )
        return output

    def times(self, rows: Tensor, factor: Tensor) -> Tensor:
        """The product's output multiplied by `factor` [..., out], element by element."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            rows, factor, self._weight, self._bias, "mul"
        )
        return output


class PackedGatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), as in Qwen2 and Llama."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.gate_proj = PackedLinear(gate, _SILU)
        self.up_proj = PackedLinear(up)
        self.down_proj = PackedLinear(down)

    def forward(self, rows: Tensor) -> Tensor:
        return _in_blocks(self._run, rows)

    def _run(self, rows: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.up_proj.times(rows, self.gate_proj(rows)))
        return output


class PackedMlp(nn.Module):
    """fc2(gelu(fc1(x))), as in SigLIP."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.fc1 = PackedLinear(first, _GELU_TANH)
        self.fc2 = PackedLinear(second)

    def forward(self, rows: Tensor) -> Tensor:
        return _in_blocks(self._run, rows)

    def _run(self, rows: Tensor) -> Tensor:
        output: Tensor = self.fc2(self.fc1(rows))
        return output


def _in_blocks(mlp: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """[..., in] → [..., out], a block of rows after the other."""
    num_rows = math.prod(rows.shape[:-1])
    if num_rows <= _BLOCK_ROWS:
        return mlp(rows)
    blocks = torch.split(rows.flatten(0, -2), block_sizes(num_rows))
    return torch.cat([mlp(block) for block in blocks]).view(*rows.shape[:-1], -1)


def block_sizes(num_rows: int) -> list[int]:
    """Of at most _BLOCK_ROWS rows each: whole tiles but for the last, and as equal as they get."""
    num_blocks = math.ceil(num_rows / _BLOCK_ROWS)
    fewest, num_larger = divmod(math.ceil(num_rows / _TILE_ROWS), num_blocks)
    sizes = [(fewest + (place < num_larger)) * _TILE_ROWS for place in range(num_blocks)]
    sizes[-1] -= sum(sizes) - num_rows
    return sizes


def _packed(module: nn.Module) -> nn.Module | None:
    """The packed form of a module; None: look at its children."""
    if _is_linear(module):
        return PackedLinear(module)
    children = dict(module.named_children())
    if children.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        gate, up, down = (children[name] for name in ("gate_proj", "up_proj", "down_proj"))
        is_silu = isinstance(children["act_fn"], nn.SiLU | SiLUActivation)
        if is_silu and _is_linear(gate) and _is_linear(up) and _is_linear(down):
            return PackedGatedMlp(gate, up, down)
    if children.keys() == {"fc1", "fc2", "activation_fn"}:
        first, second = children["fc1"], children["fc2"]
        is_gelu = isinstance(children["activation_fn"], GELUTanh)
        if is_gelu and _is_linear(first) and _is_linear(second):
            return PackedMlp(first, second)
    return None


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear  # a subclass may do more
