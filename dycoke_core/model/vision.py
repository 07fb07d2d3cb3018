"""Frames to visual tokens: vision tower, projector, spatial pooling; no newline.

transformers' `get_video_features` appends the newline in the same call; stage I has to come before
it, so the parts are put together here.
"""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor, nn
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel


def encode_frames(model: LlavaOnevisionModel, pixel_values: Tensor) -> Iterator[Tensor | None]:
    """Runs the vision tower up to its feature layer, then projects and pools.

    A generator, so that other work can run between layers: None after every layer but the last,
    the features in the end.

    Args:
        pixel_values: [F, 3, S, S] in the model's dtype.

    Yields:
        None, and at last [F, N, D] features of the language model's width.

    Source: LLaVA-OneVision's video path; equal to transformers' `get_video_features` without the
        newline (tested).
    """
    hidden = yield from _run_tower(model, pixel_values)
    pooled = model.apply_pooling(model.multi_modal_projector(hidden))
    assert isinstance(pooled, Tensor)
    yield pooled


def num_layers_run(model: LlavaOnevisionModel) -> int:
    """Layers of the tower that the features need; `vision_feature_layer` counts the embedding."""
    return max(_feature_depths(model))


def _run_tower(model: LlavaOnevisionModel, pixel_values: Tensor) -> Generator[None, None, Tensor]:
    """Hidden states at the feature layers, concatenated: [F, patches, features].

    Steps through the layers instead of asking for all hidden states, which would hold every layer's
    and run layers that no feature needs.
    """
    tower: nn.Module = getattr(model.vision_tower, "vision_model", model.vision_tower)
    depths = _feature_depths(model)
    hidden = tower.get_submodule("embeddings")(pixel_values)
    layers = list(tower.get_submodule("encoder.layers").children())
    by_depth = {0: hidden}
    for depth, layer in enumerate(layers[: max(depths)], start=1):
        output = layer(hidden, attention_mask=None)
        hidden = output[0] if isinstance(output, tuple) else output
        if depth in depths:
            by_depth[depth] = hidden
        if depth < max(depths):
            yield
    return torch.cat([by_depth[depth] for depth in depths], dim=-1)


def _feature_depths(model: LlavaOnevisionModel) -> list[int]:
    """How many layers run before each feature layer; -1 names the last layer's output."""
    num_layers = model.config.vision_config.num_hidden_layers
    layer = model.config.vision_feature_layer
    wanted = [layer] if isinstance(layer, int) else list(layer)
    return [place if place >= 0 else num_layers + 1 + place for place in wanted]
