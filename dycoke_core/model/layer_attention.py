"""The seam between transformers' layers and the engine's attention.

transformers' language models call the function registered here with each layer's rotated queries
and new keys and values; it passes them to the `LayerAttention` that came with the forward call,
which owns the cache and decides what the queries attend to.
"""

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "dycoke"


class LayerAttention(Protocol):
    """What a forward pass brings along: the caches of its rows, and what each may attend to."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Stores the new keys and values and attends.

        Args:
            query: [1, H, q, E], key and value: [1, G, q, E]; positions already applied.

        Returns:
            [1, q, H, E].
        """
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layer_attention: LayerAttention,
    **_: Any,
) -> tuple[Tensor, None]:
    layer = module.layer_idx
    assert isinstance(layer, int)
    return layer_attention.attend(layer, query, key, value, scaling), None


AttentionInterface.register(ATTENTION_NAME, _attention)
