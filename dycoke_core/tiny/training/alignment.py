"""Initialises the language model: words start where the visual tokens of what they name are.

A random language model needs thousands of steps to connect the word "red" with a red cell, and
longer to look one up by the other. So the embeddings and output rows of words for a colour, a
shape, a background or a side start with the direction in which the projector writes the same fact.
In each layer, half of the attention starts by looking for tokens of the same colour and shape, and
passes on what it finds. Training changes all of it.
"""

import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from dycoke_core.tiny.scenes import BACKGROUNDS, SHAPES
from dycoke_core.tiny.training.projection import FACTS, fact_directions
from dycoke_core.tiny.training.targets import SEEN_COLORS

_EMBEDDED, _SPOKEN = 1.0, 0.03  # how far words lie along their direction
_LOOKS, _PASSES = 0.5, 0.08  # strength of the initial attention
_SIDES = {"left": ("centre x", -1), "right": ("centre x", 1)} | {
    word: ("centre y", sign) for word, sign in (("top", -1), ("up", -1), ("bottom", 1), ("down", 1))
}


@torch.no_grad()
def align(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    directions = fact_directions(seed).float()  # [D, facts]
    embeddings = model.model.language_model.embed_tokens.weight
    for word, direction in _words(directions).items():
        (token,) = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        embeddings[token] += _EMBEDDED * direction
        model.lm_head.weight[token] += _SPOKEN * direction
    names = [FACTS.index(name) for name in (*SEEN_COLORS, *SHAPES)]
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        size = attention.head_dim
        # The slowest rotations, which hardly turn over the length of a video.
        slow = slice(size // 2 - len(names), size // 2)
        attention.k_proj.weight[:size][slow] = _LOOKS * directions[:, names].T
        for head in range(attention.num_key_value_groups):  # those that read the first KV head
            attention.q_proj.weight[head * size : (head + 1) * size][slow] = (
                _LOOKS * directions[:, names].T
            )
        _pass_on(attention.v_proj.weight, attention.o_proj.weight, directions, size)


def _words(directions: Tensor) -> dict[str, Tensor]:
    named = {name: directions[:, FACTS.index(name)] for name in (*SEEN_COLORS[1:-1], *SHAPES)}
    named |= {name: directions[:, FACTS.index(name)] for name in BACKGROUNDS}
    sides = {word: sign * directions[:, FACTS.index(fact)] for word, (fact, sign) in _SIDES.items()}
    return named | sides


def _pass_on(value: Tensor, output: Tensor, directions: Tensor, size: int) -> None:
    """Makes every head's values the facts, and its output write them where they were read."""
    count = directions.shape[1]
    for start in range(0, len(value), size):
        value[start : start + count] = directions.T
    for start in range(0, output.shape[1], size):
        output[:, start : start + count] = _PASSES * directions
