"""Plain causal attention with its own cache, for one answer outside the engine."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dycoke_core.model.llava_onevision import LlavaOnevision


class CachedAttention:
    """A `LayerAttention` in which every token attends to all before it. [S, G, E] per layer."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        keys, values = self.extend(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
        return attend_causally(query[0].transpose(0, 1), keys, values, scaling)[None]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new rows [q, G, E] and returns all rows."""
        if layer in self.keys:
            keys = torch.cat([self.keys[layer], keys])
            values = torch.cat([self.values[layer], values])
        self.keys[layer], self.values[layer] = keys, values
        return keys, values

    def cut(self, num_tokens: int) -> None:
        """Forgets everything after the first `num_tokens` tokens."""
        for rows in (self.keys, self.values):
            rows.update({layer: tensor[:num_tokens] for layer, tensor in rows.items()})


def attend_causally(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention of the newest q tokens: [q, H, E] over rows [S, G, E], S >= q, the last q of which
    are their own. Returns [q, H, E]."""
    num_queries, num_rows = query.shape[0], keys.shape[0]
    group = query.shape[1] // keys.shape[1]
    mask = None
    if 1 < num_queries < num_rows:
        seen = torch.arange(num_queries, device=query.device)[:, None] + num_rows - num_queries
        mask = torch.arange(num_rows, device=query.device) <= seen
    output = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.transpose(0, 1).repeat_interleave(group, dim=0)[None],
        values.transpose(0, 1).repeat_interleave(group, dim=0)[None],
        attn_mask=mask,
        is_causal=num_queries == num_rows,
        scale=scaling,
    )
    return output[0].transpose(0, 1)


def attention_weights(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """One query's softmax over all rows, averaged over heads: [H, E], [S, G, E] → float32 [S]."""
    grouped = query.view(keys.shape[1], -1, query.shape[-1]).float()  # [G, H/G, E]
    logits = grouped @ keys.permute(1, 2, 0).float() * scaling  # [G, H/G, S]
    return logits.softmax(dim=-1).mean(dim=(0, 1))


@torch.inference_mode()
def generate(
    model: LlavaOnevision, embeds: Tensor, attention: Any, *, start: int = 0, max_tokens: int
) -> list[int]:
    """Greedy decoding after a prompt, up to and including the end token.

    Args:
        embeds: [q, D], the part of the prompt that `attention` has not seen.
        attention: a `LayerAttention`.
        start: position of the first of them.
    """
    token_ids: list[int] = []
    position = start + embeds.shape[0]
    positions = torch.arange(start, position, device=embeds.device)[None]
    hidden = model.forward(embeds, positions, attention)
    while True:
        token_ids.append(int(model.logits(hidden[-1:])[0].argmax()))
        if token_ids[-1] in model.eos_token_ids or len(token_ids) == max_tokens:
            return token_ids
        hidden = model.forward(
            model.embed_tokens(token_ids[-1:]),
            torch.tensor([[position]], device=embeds.device),
            attention,
        )
        position += 1


def text_of(model: LlavaOnevision, token_ids: list[int]) -> str:
    text = model.prompt_encoder.tokenizer.decode(token_ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text
