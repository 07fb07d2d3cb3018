"""FastV against layers that really lose their tokens."""

import pytest
import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from dycoke_core.model.llava_onevision import LlavaOnevision
from loadtest.baselines.cached_attention import generate
from loadtest.baselines.fastv import FastVAttention
from tests.compression import slow_loops
from tests.loadtest.baselines.prompts import prompt_of


@pytest.mark.parametrize("layer", [1, 3, 5])
@torch.inference_mode()
def test_fastv_equals_a_model_whose_later_layers_lose_the_tokens(
    layer: int, tiny_model: LlavaOnevision, eager: LlavaOnevisionForConditionalGeneration
) -> None:
    embeds, visual = prompt_of(tiny_model)
    attention = FastVAttention(visual, layer=layer, retained_ratio=0.35)
    token_ids = generate(tiny_model, embeds, attention, max_tokens=6)
    assert attention.kept is not None and len(attention.kept) == int(0.35 * len(visual))

    expected, kept = decode_shortened(eager, embeds, visual, layer, num_tokens=len(token_ids))
    assert attention.kept.tolist() == kept
    assert token_ids == expected


def decode_shortened(
    model: LlavaOnevisionForConditionalGeneration,
    embeds: Tensor,
    visual: range,
    layer: int,
    *,
    num_tokens: int,
) -> tuple[list[int], list[int]]:
    """FastV by running the whole answer so far again for each token, without any cache.

    Visual rows are taken out of the hidden states before `layer`. What is kept is decided by the
    prompt alone.
    """
    text_model = model.model.language_model
    num_prompt = len(embeds)
    kept: list[int] = []
    answer: list[int] = []
    while len(answer) < num_tokens:
        new = model.get_input_embeddings()(torch.tensor(answer, dtype=torch.long))
        hidden = torch.cat([embeds, new])[None]
        positions = torch.arange(hidden.shape[1])[None]
        for index, block in enumerate(text_model.layers):
            if index == layer - 1 and not kept:
                kept = rank(text_model, index, hidden, positions, visual)
            if index == layer:
                gone = set(visual) - {visual.start + place for place in kept}
                stay = [row for row in range(hidden.shape[1]) if row not in gone]
                hidden, positions = hidden[:, stay], positions[:, stay]
            size = hidden.shape[1]
            mask = torch.full((1, 1, size, size), -torch.inf).triu(1)
            hidden = block(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=text_model.rotary_emb(hidden, positions),
            )
        logits = model.lm_head(text_model.norm(hidden[:, -1]))
        answer.append(int(logits.argmax()))
    assert num_prompt > visual.stop
    return answer, kept


def rank(
    text_model: Qwen2Model, index: int, hidden: Tensor, positions: Tensor, visual: range
) -> list[int]:
    """The visual tokens that the last prompt token attends to most, by the layer's own weights."""
    block = text_model.layers[index]
    size = hidden.shape[1]
    _, weights = block.self_attn(
        block.input_layernorm(hidden),
        position_embeddings=text_model.rotary_emb(hidden, positions),
        attention_mask=torch.full((1, 1, size, size), -torch.inf).triu(1),
    )
    scores = weights[0, :, -1, visual.start : visual.stop].mean(dim=0)
    return slow_loops.highest(scores, int(0.35 * len(visual)), 0)


def test_fastv_needs_a_layer_that_ranks() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FastVAttention(range(3), layer=0, retained_ratio=0.5)
