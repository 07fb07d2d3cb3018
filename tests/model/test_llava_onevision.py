"""The vision path, put together by us, against transformers' own."""

from collections.abc import Generator

import pytest
import torch

from dycoke_core.model.llava_onevision import LlavaOnevision, encode_frames, run_tower


def pixels(num_frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.randn(num_frames, 3, 224, 224, generator=generator)


def encode(model: LlavaOnevision, pixel_values: torch.Tensor) -> torch.Tensor:
    *pauses, features = encode_frames(model.model.model, pixel_values)
    assert not any(pause is not None for pause in pauses)
    assert features is not None
    return features


def run_to_end(slices: Generator[None, None, torch.Tensor]) -> torch.Tensor:
    while True:
        try:
            next(slices)
        except StopIteration as end:
            assert isinstance(end.value, torch.Tensor)
            return end.value


@torch.inference_mode()
def test_the_tower_can_be_left_between_its_layers(tiny_model: LlavaOnevision) -> None:
    slices = list(encode_frames(tiny_model.model.model, pixels(2)))
    assert len(slices) == 2, "two layers, one pause"
    torch.testing.assert_close(slices[-1], encode(tiny_model, pixels(2)))


@torch.inference_mode()
def test_features_are_transformers_video_features_without_the_newline(
    tiny_model: LlavaOnevision,
) -> None:
    frames = pixels(5)
    expected = tiny_model.model.model.get_video_features(frames[None]).pooler_output[0]
    features = encode(tiny_model, frames)
    assert features.shape == (5, tiny_model.tokens_per_frame, 256)
    torch.testing.assert_close(features.flatten(0, 1), expected[: 5 * 49])
    for behind in expected[5 * 49 :]:  # releases before 5.23 append the newline elsewhere
        torch.testing.assert_close(tiny_model.model.model.image_newline, behind)


@pytest.mark.parametrize("layer", [-1, -2, 1, [-2, -1], [0, 2]])
@torch.inference_mode()
def test_every_choice_of_feature_layer_is_followed(
    layer: int | list[int], tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model.model.model
    monkeypatch.setattr(model.config, "vision_feature_layer", layer)
    states = model.vision_tower(pixels(2), output_hidden_states=True).hidden_states
    wanted = [layer] if isinstance(layer, int) else layer
    expected = torch.cat([states[place] for place in wanted], dim=-1)
    hidden = run_to_end(run_tower(model, pixels(2)))
    torch.testing.assert_close(hidden, expected)


@torch.inference_mode()
def test_frames_do_not_depend_on_their_batch(tiny_model: LlavaOnevision) -> None:
    together = encode(tiny_model, pixels(4))
    alone = [encode(tiny_model, frame[None]) for frame in pixels(4)]
    torch.testing.assert_close(together, torch.cat(alone))
