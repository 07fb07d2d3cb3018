"""Batches: prompts as the engine makes them, and nothing but what their key says."""

import torch

from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.tiny.questions import GUESS, questions_about
from dycoke_core.tiny.scenes import HELD_OUT, sample_scene
from dycoke_core.tiny.training.batches import (
    ASKED,
    IGNORED,
    BatchKey,
    encode_question,
    frame_batch,
    prefix_ids,
    video_batch,
)


def test_training_asks_in_the_prompts_that_the_engine_asks_in(tiny_model: LlavaOnevision) -> None:
    from dycoke_core.sequence import ChatMessage

    question = questions_about(sample_scene(1))[0]
    prompt = tiny_model.prompt_encoder((ChatMessage("user", question.text),))
    asked, answer = encode_question(question)
    assert (prefix_ids(), asked) == (prompt.ids_before_video, prompt.ids_after_video)
    assert tiny_model.prompt_encoder.tokenizer.decode(answer) == question.answer + "<|im_end|>"


def test_a_batch_depends_on_its_key_alone() -> None:
    first, again, other = (
        video_batch(BatchKey(0, step), num_videos=2, num_frames=8) for step in (3, 3, 4)
    )
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)
    for block, same in zip(first.blocks, again.blocks, strict=True):
        assert torch.equal(block.ids, same.ids)
        is_answer = block.targets != IGNORED
        assert (is_answer.sum(dim=-1) >= 3).all()


def test_a_guess_takes_the_place_of_one_short_question() -> None:
    plain, guessing = (
        video_batch(BatchKey(0, 0), num_videos=4, num_frames=8, has_guesses=has_guesses)
        for has_guesses in (False, True)
    )
    for before, after in zip(plain.blocks, guessing.blocks, strict=True):
        is_guess = after.families == ASKED.index(GUESS)
        assert torch.equal(before.ids[~is_guess], after.ids[~is_guess])
    assert [int((b.families == ASKED.index(GUESS)).sum()) for b in guessing.blocks] == [4, 0]
    assert not any((block.families == ASKED.index(GUESS)).any() for block in plain.blocks)


def test_no_frame_of_the_first_stage_shows_a_held_out_pair() -> None:
    from tests.tiny.seen import look_at

    for step in range(4):
        batch = frame_batch(BatchKey(0, step), num_frames=24)
        named = [s for s in look_at(batch.frames.numpy())[0] if s.color != "white"]
        plain = {(s.color, s.shape) for s in named if s.frame % 2 == 0}
        assert not plain & HELD_OUT
