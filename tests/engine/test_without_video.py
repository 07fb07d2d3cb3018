"""Conversations without a video: the engine's invariants hold for them too."""

from typing import Any

import pytest
import torch

from dycoke_core.errors import InvalidRequestError
from dycoke_core.sequence import ChatMessage, FinishReason, Sequence
from tests.engine.lab import Lab
from tests.engine.recording import assert_same_logits, report_of

CONVERSATION = (
    ChatMessage("system", "Be brief."),
    ChatMessage("user", "What color is the circle?"),
    ChatMessage("assistant", "Red."),
    ChatMessage("user", "How many objects are there?"),
)


def text_only(lab: Lab, name: str = "t", **ask: Any) -> Sequence:
    sequence = lab.sequence(name, **ask)
    sequence.messages = CONVERSATION
    sequence.frames = None
    return sequence


def test_it_equals_transformers_greedy_generate(lab: Lab) -> None:
    engine, sequence = lab.engine(), text_only(lab, max_tokens=16)
    events = engine.run(sequence)["t"]
    prompt = lab.reference_model.prompt_encoder(CONVERSATION, has_video=False)
    ids = torch.tensor([[*prompt.ids_before_video, *prompt.ids_after_video]])
    expected = lab.transformers_model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert sequence.output_token_ids == expected.sequences[0, ids.shape[1] :].tolist()
    assert_same_logits(engine.recordings["t"].logits, [step[0] for step in expected.logits])
    assert report_of(events).prompt_tokens == ids.shape[1]


def test_nothing_is_kept_of_nothing(lab: Lab) -> None:
    engine = lab.engine()
    engine.run(text_only(lab))  # its first token is there when the second one comes
    report = report_of(engine.run(text_only(lab, "again"))["again"])
    kept = report.compression
    assert (kept.visual_tokens_in, kept.visual_tokens_prefill, kept.kept_per_frame) == (0, 0, ())
    assert kept.retained_ratio_prefill is None and kept.retained_ratio_decode is None
    assert kept.retained_ratio_decode_all_layers is None
    assert kept.exact_flops_actual == kept.exact_flops_full > 0
    assert report.memory.kv_bytes == report.memory.kv_bytes_full_tokens > 0
    assert report.cached_tokens == 0 and report.timings.vision_s == 0
    assert not report.cache.has_features_hit and not report.cache.has_prefix_hit


def test_beside_videos_nobody_notices(lab: Lab) -> None:
    engine, alone = lab.engine(), text_only(lab)
    lab.engine().run(alone)
    beside = text_only(lab)
    engine.run(lab.sequence("v"), beside, lab.sequence("full", compression="full"))
    assert beside.output_token_ids == alone.output_token_ids
    assert_same_logits(engine.recordings["v"].logits, lab.alone().recording.logits)


def test_an_interrupted_one_goes_on_at_the_next_token(lab: Lab) -> None:
    whole = text_only(lab, max_tokens=10)
    lab.engine().run(whole)
    resumed = text_only(lab, max_tokens=10, forced=tuple(whole.output_token_ids[:4]))
    lab.engine().run(resumed)
    assert resumed.output_token_ids == whole.output_token_ids


def test_an_aborted_one_leaves_nothing(lab: Lab) -> None:
    engine = lab.engine()
    engine.add(text_only(lab, max_tokens=50))
    for _ in range(4):
        engine.step()
    assert engine.abort("t")
    assert engine.stats().kv_bytes_in_use == 0


def test_an_end_token_that_is_ignored_does_not_end_the_answer(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, whole = lab.engine(), text_only(lab, "whole", max_tokens=8)
    engine.run(whole)
    end = frozenset([whole.output_token_ids[2]])
    monkeypatch.setattr(lab.model, "eos_token_ids", end)
    short, long = (
        text_only(lab, "short", max_tokens=8),
        text_only(lab, "long", max_tokens=8, ignore_eos=True),
    )
    events = engine.run(short, long)
    assert events["short"][-1].finish_reason is FinishReason.STOP
    assert len(short.output_token_ids) == 1 + whole.output_token_ids.index(next(iter(end)))
    assert events["long"][-1].finish_reason is FinishReason.LENGTH
    assert long.output_token_ids == whole.output_token_ids


def test_a_video_belongs_to_a_user_turn(lab: Lab) -> None:
    sequence = lab.sequence()
    sequence.messages, sequence.video_turn = CONVERSATION, 2
    with pytest.raises(InvalidRequestError, match="user turn"):
        lab.engine().add(sequence)
