"""What training sees of a frame, and where a visual token has its facts."""

import torch

from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.tiny.architecture import HIDDEN_SIZE
from dycoke_core.tiny.render import render
from dycoke_core.tiny.scenes import sample_scene
from dycoke_core.tiny.training.projection import FACTS, fact_directions, visual_tokens


def test_training_sees_the_tokens_that_the_engine_sees(tiny_model: LlavaOnevision) -> None:
    frames = torch.from_numpy(render(sample_scene(1, num_frames=8)))
    *_, expected = tiny_model.encode_frames(frames)
    torch.testing.assert_close(visual_tokens(tiny_model.model, frames), expected)


def test_facts_are_written_in_directions_that_disturb_no_other() -> None:
    directions = fact_directions(3)
    assert directions.shape == (HIDDEN_SIZE, len(FACTS))
    product = directions.T @ directions
    torch.testing.assert_close(product, torch.eye(len(FACTS), dtype=product.dtype))
    assert torch.equal(fact_directions(3), directions)
    assert not torch.equal(fact_directions(4), directions)
