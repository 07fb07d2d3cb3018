"""PruMerge against plain loops, on what the tower saw."""

import numpy as np
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_core.model.llava_onevision import LlavaOnevision
from loadtest.baselines.prumerge import TowerView, look_at, merge_tokens
from tests.compression import slow_loops
from tests.engine.recording import moving_square


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
