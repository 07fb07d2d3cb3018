"""FastV and PruMerge against plain loops and against layers that really lose their tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import ChatMessage
from loadtest.baselines.cached_attention import CachedAttention, generate, text_of
from loadtest.baselines.fastv import FastVAttention
from loadtest.baselines.prumerge import TowerView, look_at, merge_tokens
from tests.compression import slow_loops
from tests.engine.recording import RecordingEngine, make_sequence, moving_square, report_of

NUM_FRAMES = 4


@pytest.fixture(scope="module")
def eager(random_checkpoint: Path) -> LlavaOnevisionForConditionalGeneration:
    return LlavaOnevisionForConditionalGeneration.from_pretrained(
        random_checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def prompt_of(model: LlavaOnevision) -> tuple[Tensor, range]:
    """[P, D] of a short clip and a question, and the places of its visual tokens."""
    frames = torch.from_numpy(moving_square(3, NUM_FRAMES))
    *_, features = model.encode_frames(frames)
    assert features is not None
    prompt = model.prompt_encoder((ChatMessage("user", "Describe the video."),))
    prefix, _ = model.embed_prefix(prompt.ids_before_video, features.flatten(0, 1))
    first = len(prompt.ids_before_video)
    embeds = torch.cat([prefix, model.embed_tokens(prompt.ids_after_video)])
    return embeds, range(first, first + features.shape[0] * features.shape[1])


def test_plain_generation_equals_the_engine_with_full_tokens(engine: RecordingEngine) -> None:
    sequence = make_sequence(video=3, num_frames=NUM_FRAMES, compression="full", max_tokens=10)
    report = report_of(engine.run(sequence)["a"])
    embeds, _ = prompt_of(engine.model)
    token_ids = generate(engine.model, embeds, CachedAttention(), max_tokens=10)
    assert token_ids == sequence.output_token_ids
    assert text_of(engine.model, token_ids) == report.text


def test_a_cut_cache_answers_as_a_new_one(tiny_model: LlavaOnevision) -> None:
    embeds, visual = prompt_of(tiny_model)
    whole = generate(tiny_model, embeds, CachedAttention(), max_tokens=8)
    attention = CachedAttention()
    prefix, question = embeds[: visual.stop], embeds[visual.stop :]
    with torch.inference_mode():
        tiny_model.forward(prefix, torch.arange(visual.stop)[None], attention)
    for _ in range(2):
        attention.cut(visual.stop)
        again = generate(tiny_model, question, attention, start=visual.stop, max_tokens=8)
        assert again == whole


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


def test_prumerge_sees_the_attention_and_keys_of_the_towers_last_layer(
    tiny_model: LlavaOnevision, eager: LlavaOnevisionForConditionalGeneration
) -> None:
    frames = torch.from_numpy(moving_square(3, 6))
    view = look_at(tiny_model, frames)
    *_, features = tiny_model.encode_frames(frames)
    assert features is not None
    torch.testing.assert_close(view.features, features)
    with torch.inference_mode():
        pixels = tiny_model.normalizer(frames, torch.float32)
        output = eager.model.vision_tower(pixels, output_attentions=True)
    paid = output.attentions[-1].mean(dim=(1, 2))  # [F, 196]
    grid = paid.view(6, 7, 2, 7, 2).mean(dim=(2, 4))  # 14 x 14 halved: bilinear is the mean
    torch.testing.assert_close(view.attention, grid.flatten(1))
    assert view.keys.shape == (6, 49, 128)


def test_prumerge_merges_as_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 100, 5, generator=generator)
    attention = torch.rand(2, 100, generator=generator)
    keys = torch.randn(2, 100, 6, generator=generator)
    places, tokens = merge_tokens(TowerView(features, attention, keys), 0.25)

    expected_places, expected = [], []
    for f in range(2):
        kept = slow_loops.highest(attention[f], 25, 0)
        pruned = [n for n in range(100) if n not in kept]
        for token in kept:
            cosines = torch.cosine_similarity(keys[f, token][None], keys[f, pruned], dim=-1)
            near = sorted(range(75), key=lambda i: (-float(cosines[i]), i))[:32]
            gain = sum(attention[f, pruned[i]] * features[f, pruned[i]] for i in near)
            expected_places.append(f * 100 + token)
            expected.append(features[f, token] + gain)
    assert places.tolist() == expected_places
    torch.testing.assert_close(tokens, torch.stack(expected))


def test_prumerge_with_every_token_changes_nothing() -> None:
    features = torch.randn(3, 10, 4)
    view = TowerView(features, torch.rand(3, 10), torch.randn(3, 10, 6))
    places, tokens = merge_tokens(view, 1.0)
    assert places.tolist() == list(range(30))
    assert np.array_equal(tokens, features.flatten(0, 1))
