"""What the machine can do, measured in the same run, and the least that each stage can cost.

A decode step reads the language model's weights and its sequences' keys and values once; a prefill
computes its FLOPs. Lower bounds: no cache is assumed to keep bytes between steps, and neither
dispatch nor softmax is counted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dycoke_core.compression import flops
from dycoke_core.engine.budget import row_bytes
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.packing import PackedLinear
from loadtest.bench import step_seconds


@dataclass(frozen=True)
class Limits:
    """Rates of the machine and the bytes and FLOPs of the model.

    matmul_flops_s: products of the model's own sizes, in its dtype. read_bytes_s: a sum over memory
    beyond the caches. weight_read_bytes_s: the language head for one row, as the engine keeps it.
    """

    model: LlavaOnevision
    matmul_flops_s: float
    read_bytes_s: float
    weight_read_bytes_s: float

    def decode_seconds(self, batch: int, rows_per_layer: float) -> float:
        """One step in which each sequence reads `rows_per_layer` cached tokens, layers averaged."""
        text = self.model.text_geometry
        kv = batch * rows_per_layer * text.num_layers * row_bytes(text, self.model.dtype)
        return (self.weight_bytes + kv) / self.read_bytes_s

    def prefill_seconds(self, num_tokens: int) -> float:
        return flops.prefill_flops(self.model.text_geometry, num_tokens) / self.matmul_flops_s

    def question_seconds(self, num_tokens: int, num_cached: int) -> float:
        """A question's own prefill over a cached prefix, and its first token."""
        text = self.model.text_geometry
        whole = flops.prefill_flops(text, num_cached + num_tokens)
        own = whole - flops.prefill_flops(text, num_cached)
        return self.decode_seconds(1, num_cached) + own / self.matmul_flops_s

    def rates(self) -> dict[str, float]:
        return {
            "matmul_gflops_s": self.matmul_flops_s / 1e9,
            "read_gb_s": self.read_bytes_s / 1e9,
            "weight_read_gb_s": self.weight_read_bytes_s / 1e9,
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes read by one pass through the layers and the language head, in plain layout."""
        text = self.model.text_geometry
        head = text.head_size * (2 * text.num_heads + 2 * text.num_kv_heads)
        layer = text.hidden_size * (head + 3 * text.intermediate_size)
        weights = text.num_layers * layer + text.hidden_size * text.vocab_size
        return weights * self.model.dtype.itemsize


def measure_limits(model: LlavaOnevision) -> Limits:
    text, device = model.text_geometry, model.device
    rows = torch.randn(2960, text.hidden_size, device=device).to(model.dtype)
    weights = torch.randn(text.hidden_size, text.intermediate_size, device=device).to(model.dtype)
    num_flops = 2 * rows.shape[0] * weights.numel()
    memory = torch.ones(2**27, dtype=torch.int32, device=device)  # 512 MiB
    return Limits(
        model,
        matmul_flops_s=num_flops / _seconds(lambda: rows @ weights),
        read_bytes_s=memory.nbytes / _seconds(lambda: memory.max()),
        weight_read_bytes_s=head_read_bytes_s(model),
    )


def head_read_bytes_s(model: LlavaOnevision) -> float:
    """Rate at which one row's product with the language head reads its weights."""
    text, head = model.text_geometry, model.model.lm_head
    assert isinstance(head, PackedLinear | torch.nn.Linear)
    row = torch.randn(1, text.hidden_size, device=model.device).to(model.dtype)
    num_bytes = text.vocab_size * text.hidden_size * model.dtype.itemsize
    return num_bytes / _seconds(lambda: head(row))


def _seconds(operation: Callable[[], Tensor]) -> float:
    def run() -> None:
        operation()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step_seconds(run)
