"""Many questions about a video in one pass, against a pass for each."""

import torch

from dycoke_core.tiny.architecture import new_model
from dycoke_core.tiny.training.packed import run_packed


def test_one_pass_over_many_questions_equals_a_pass_for_each() -> None:
    language_model = new_model(0).model.language_model
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randn(2, 30, 256, generator=generator)
    blocks = [torch.randn(2, n, s, 256, generator=generator) for n, s in ((3, 5), (1, 9))]
    with torch.no_grad():
        packed, _ = run_packed(language_model, prefix, blocks, tap_layer=3)
        for block, result in zip(blocks, packed, strict=True):
            for place in range(block.shape[1]):
                whole = torch.cat([prefix, block[:, place]], dim=1)
                alone = language_model(inputs_embeds=whole, use_cache=False).last_hidden_state
                torch.testing.assert_close(result[:, place], alone[:, 30:], atol=1e-5, rtol=1e-4)
