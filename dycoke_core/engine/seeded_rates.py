"""An engine's rates before anything has run, estimated from the speed of one matrix product."""

import torch

from dycoke_core.compression.flops import prefill_flops, vision_flops
from dycoke_core.engine.backend import Backend
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.rates import Rates

_SEED_ROWS = 256
_SEED_SLACK = 2.0  # of what matrix products alone would take
_SEED_STEP_TOKENS = 8  # prompt tokens that a decode step takes as long as


def seeded_rates(model: VideoLanguageModel, backend: Backend, *, max_prompt_tokens: int) -> Rates:
    """Rates before anything has run, from the speed of one matrix product of the model's shape."""
    text, size = model.text_geometry, model.image_size
    flops_per_s = _product_flops_per_s(model, backend) / _SEED_SLACK
    token_s = prefill_flops(text, _SEED_ROWS) / _SEED_ROWS / flops_per_s
    vision = model.vision_geometry(size, size)
    return Rates(
        patch_s=vision_flops(vision, 1) / vision.num_patches / flops_per_s,
        token_s=token_s,
        step_s=_SEED_STEP_TOKENS * token_s,
        max_prompt_tokens=max_prompt_tokens,
    )


@torch.inference_mode()
def _product_flops_per_s(model: VideoLanguageModel, backend: Backend) -> float:
    text = model.text_geometry
    one = torch.ones((), device=model.device, dtype=model.dtype)
    rows = one.expand(_SEED_ROWS, text.hidden_size).contiguous()
    weights = one.expand(text.hidden_size, text.intermediate_size).contiguous()
    seconds = []
    for _ in range(3):
        began = backend.mark()
        rows @ weights
        seconds.append(backend.seconds(began, backend.mark()))
    num_flops = 2.0 * _SEED_ROWS * weights.numel()
    return num_flops / max(*seconds[1:], 1e-9)  # the first one is a warm-up
