"""LLaVA-PruMerge, adapted to SigLIP: the tokens that the vision tower attends to most stay, and
absorb those pruned near them."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from dycoke_core.compression.counts import share_of
from dycoke_core.compression.kv_pruning import select_visual_tokens
from dycoke_core.model.llava_onevision import LlavaOnevision, num_layers_run

NUM_NEIGHBOURS = 32
BATCH_FRAMES = 4  # attention of 729 patches to each other, in 16 heads, is large


@dataclass(frozen=True, slots=True)
class TowerView:
    """Frames' tokens as the last layer of the vision tower that runs sees them.

    attention: float32 [F, N]; keys: float32 [F, N, vision width]; features: [F, N, D].
    """

    features: Tensor
    attention: Tensor
    keys: Tensor


@torch.inference_mode()
def look_at(model: LlavaOnevision, frames: Tensor) -> TowerView:
    """Encodes uint8 frames [F, S, S, 3] and keeps the last layer's attention and keys.

    Deviation: PruMerge ranks by the attention of CLIP's CLS token. SigLIP has none, so a patch
        is ranked by the mean attention of all patches to it. As LLaVA-OneVision pools its tokens,
        attention and keys are pooled to the same grid. This adaptation is ours.
    """
    views = [_look_at_few(model, few) for few in torch.split(frames, BATCH_FRAMES)]
    return TowerView(
        torch.cat([view.features for view in views]),
        torch.cat([view.attention for view in views]),
        torch.cat([view.keys for view in views]),
    )


def merge_tokens(view: TowerView, retained_ratio: float = 0.55) -> tuple[Tensor, Tensor]:
    """Keeps the most attended tokens of each frame and adds to each those pruned near it.

    A kept token gains the sum of its 32 nearest pruned tokens of the frame, by the cosine of their
    keys, weighted by their attention.

    Returns:
        int64 [V] places among the F * N tokens, ascending, and the merged tokens [V, D].

    Source: Shang et al., "LLaVA-PruMerge", arXiv 2403.15388; fixed 55 % as in DyCoke's paper.
    Deviation: see `look_at`; each frame of the video is a separate image; tokens merge after the
        projector, only with pruned ones, and no extra token stands for everything pruned. In
        frames of 49 tokens fewer than 32 are pruned, so every kept token gains the same.
    """
    num_frames, tokens_per_frame, _ = view.features.shape
    num_kept = share_of(retained_ratio, tokens_per_frame)
    places, merged = [], []
    for frame in range(num_frames):
        kept = select_visual_tokens(view.attention[frame], num_kept)
        places.append(frame * tokens_per_frame + kept)
        merged.append(
            _merge_frame(view.features[frame], view.attention[frame], view.keys[frame], kept)
        )
    return torch.cat(places), torch.cat(merged)


def _look_at_few(model: LlavaOnevision, frames: Tensor) -> TowerView:
    layer = _last_layer(model)
    inputs: list[Tensor] = []
    hook = layer.get_submodule("layer_norm1").register_forward_hook(
        lambda module, arguments, output: inputs.append(output)
    )
    try:
        *_, features = model.encode_frames(frames)
    finally:
        hook.remove()
    assert features is not None
    attention, keys = _attention_and_keys(layer.get_submodule("self_attn"), inputs[0])
    return TowerView(features, _pool(attention[..., None])[..., 0], _pool(keys))


def _merge_frame(features: Tensor, attention: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
    is_pruned = torch.ones(len(features), dtype=torch.bool, device=features.device)
    is_pruned[kept] = False
    pruned = is_pruned.nonzero()[:, 0]
    directions = normalize(keys, dim=-1)
    similarity = directions[kept] @ directions[pruned].T  # [kept, pruned]
    order = similarity.sort(dim=-1, descending=True, stable=True).indices
    nearest = pruned[order[:, :NUM_NEIGHBOURS]]  # [kept, neighbours]
    gains = (attention[nearest][..., None] * features[nearest].float()).sum(dim=1)
    return (features[kept].float() + gains).to(features.dtype)


def _last_layer(model: LlavaOnevision) -> nn.Module:
    tower = model.model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    last = num_layers_run(model.model.model) - 1
    layer: nn.Module = tower.get_submodule(f"encoder.layers.{last}")
    return layer


def _attention_and_keys(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean attention paid to each patch, float32 [F, P], and keys, float32 [F, P, width]."""
    keys = layer.get_submodule("k_proj")(inputs)
    queries = layer.get_submodule("q_proj")(inputs)
    heads = (*inputs.shape[:2], cast(int, layer.num_heads), -1)
    logits = torch.einsum("fqhe,fkhe->fhqk", queries.view(heads), keys.view(heads)).float()
    weights = (logits * cast(float, layer.scale)).softmax(dim=-1)
    return weights.mean(dim=(1, 2)), keys.float()


def _pool(patches: Tensor) -> Tensor:
    """[F, P, C] → [F, N, C], as the features are pooled."""
    num_frames, num_patches, channels = patches.shape
    side = math.isqrt(num_patches)
    grid = patches.transpose(1, 2).reshape(num_frames, channels, side, side)
    pooled = interpolate(grid, size=[math.ceil(side / 2)] * 2, mode="bilinear")
    return pooled.flatten(2).transpose(1, 2)
