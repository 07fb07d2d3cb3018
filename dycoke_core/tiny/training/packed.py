"""Runs the language model over a video and many questions at once.

All questions about a video share its prefix, as in the service: each attends to the prefix and to
itself, never to another question, and its positions start where the prefix ends. So one pass over
1,568 visual tokens teaches a dozen answers. Numerically the same as one pass per question.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model


def run_packed(
    language_model: Qwen2Model, prefix: Tensor, blocks: list[Tensor], *, tap_layer: int
) -> tuple[list[Tensor], Tensor]:
    """Runs a transformers Qwen2 model over a prefix and blocks of questions.

    Args:
        prefix: [B, P, D] embeddings.
        blocks: each [B, Q, S, D] embeddings: Q questions of S tokens.
        tap_layer: after how many layers the prefix is tapped.

    Returns:
        The blocks after the final norm, [B, Q, S, D] each, and the prefix at the tap, [B, P, D].
    """
    num_prefix = prefix.shape[1]
    longest = max(block.shape[2] for block in blocks)
    positions = torch.arange(num_prefix + longest, device=prefix.device)[None]
    cos, sin = language_model.rotary_emb(prefix, positions)
    rotations = [(cos[0, :num_prefix], sin[0, :num_prefix])]
    for block in blocks:
        own = slice(num_prefix, num_prefix + block.shape[2])
        rotations.append((cos[0, own], sin[0, own]))
    tap = prefix
    for depth, layer in enumerate(language_model.layers, start=1):
        prefix, blocks = _layer(layer, prefix, blocks, rotations)
        if depth == tap_layer:
            tap = prefix
    return [language_model.norm(block) for block in blocks], tap


def _layer(
    layer: Qwen2DecoderLayer,
    prefix: Tensor,
    blocks: list[Tensor],
    rotations: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, list[Tensor]]:
    attention = layer.self_attn
    parts = [prefix[:, None], *blocks]  # all [B, Q, S, D]
    flat = _join(parts)
    normed = _cast(layer.input_layernorm(flat))
    heads = [
        _heads(projection(normed), parts, attention.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]  # each part [B, Q, H or G, S, E]
    queries = [_rotate(q, *r) for q, r in zip(heads[0], rotations, strict=True)]
    keys = [_rotate(k, *r) for k, r in zip(heads[1], rotations, strict=True)]
    values = heads[2]
    groups = attention.num_key_value_groups
    prefix_key = keys[0][:, 0].repeat_interleave(groups, dim=1)
    prefix_value = values[0][:, 0].repeat_interleave(groups, dim=1)
    mixed = [
        F.scaled_dot_product_attention(
            queries[0][:, 0], prefix_key, prefix_value, is_causal=True
        ).transpose(1, 2)[:, None]
    ]
    for query, key, value in zip(queries[1:], keys[1:], values[1:], strict=True):
        own_key = key.repeat_interleave(groups, dim=2)
        own_value = value.repeat_interleave(groups, dim=2)
        mixed.append(_attend(query, prefix_key, prefix_value, own_key, own_value))
    flat = flat + attention.o_proj(_join([part.flatten(3) for part in mixed]))
    flat = flat + layer.mlp(_cast(layer.post_attention_layernorm(flat)))
    prefix_out, *blocks_out = _split(flat, parts)
    return prefix_out[:, 0], blocks_out


def _cast(normed: Tensor) -> Tensor:
    """Casts to autocast's type once; otherwise each of the following products would."""
    enabled = torch.is_autocast_enabled("cpu")
    return normed.to(torch.get_autocast_dtype("cpu")) if enabled else normed


def _attend(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, own_key: Tensor, own_value: Tensor
) -> Tensor:
    """Attention of questions to the whole prefix and, causally, to themselves.

    Args:
        query, own_key, own_value: [B, Q, H, S, E]; prefix_key, prefix_value: [B, H, P, E].

    Returns:
        [B, Q, S, H, E].
    """
    num_batch, num_questions, num_heads, length, size = query.shape
    num_prefix = prefix_key.shape[2]
    by_head = query.transpose(1, 2).reshape(num_batch, num_heads, -1, size)
    to_prefix = (by_head @ prefix_key.mT).view(
        num_batch, num_heads, num_questions, length, num_prefix
    )
    to_self = (query @ own_key.mT).transpose(1, 2)  # [B, H, Q, S, S]
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    to_self = to_self.masked_fill(future, float("-inf"))
    weights = (torch.cat([to_prefix, to_self], dim=-1) * size**-0.5).softmax(dim=-1)
    from_prefix = weights[..., :num_prefix].flatten(2, 3) @ prefix_value
    from_self = weights[..., num_prefix:].transpose(1, 2) @ own_value  # [B, Q, H, S, E]
    by_question = from_prefix.view(num_batch, num_heads, num_questions, length, size)
    mixed: Tensor = by_question.permute(0, 2, 3, 1, 4) + from_self.transpose(2, 3)
    return mixed


def _join(parts: list[Tensor]) -> Tensor:
    """[B, Q, S, D] each → [B, all tokens, D]."""
    return torch.cat([part.flatten(1, 2) for part in parts], dim=1)


def _split(flat: Tensor, parts: list[Tensor]) -> list[Tensor]:
    sizes = [part.shape[1] * part.shape[2] for part in parts]
    pieces = torch.split(flat, sizes, dim=1)
    return [
        piece.view(len(piece), *part.shape[1:3], -1)
        for piece, part in zip(pieces, parts, strict=True)
    ]


def _heads(flat: Tensor, parts: list[Tensor], size: int) -> list[Tensor]:
    pieces = _split(flat, parts)
    return [piece.view(*piece.shape[:3], -1, size).transpose(2, 3) for piece in pieces]


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return heads * cos.to(heads.dtype) + turned * sin.to(heads.dtype)
