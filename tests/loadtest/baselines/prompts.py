"""A clip and a question, as a model embeds them."""

import torch
from torch import Tensor

from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import ChatMessage
from tests.engine.recording import moving_square

NUM_FRAMES = 4


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
