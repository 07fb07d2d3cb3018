"""The engine's contract: events, limits, finish reasons and what a report says."""

import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dycoke_core.config import EngineConfig
from dycoke_core.engine import Engine
from dycoke_core.engine.budget import row_bytes
from dycoke_core.errors import InvalidRequestError, PromptTooLongError
from dycoke_core.sequence import FinishReason, Stage
from tests.engine.lab import Lab
from tests.engine.recording import RecordingEngine, make_sequence, report_of


def test_events_number_the_tokens_and_their_text_is_the_answer(lab: Lab) -> None:
    answer = lab.alone(max_tokens=10)
    events, report = answer.events, answer.report
    assert [event.index for event in events] == list(range(10))
    assert [event.token_ids for event in events] == [(token,) for token in answer.token_ids]
    assert [event.finish_reason for event in events] == [None] * 9 + [FinishReason.LENGTH]
    assert "".join(event.text for event in events) == report.text
    tokenizer: PreTrainedTokenizerFast = lab.model.prompt_encoder.tokenizer
    assert report.text == tokenizer.decode(answer.token_ids)
    assert answer.sequence.stage is Stage.FINISHED


@pytest.mark.parametrize("num_published", [1, 6])
def test_an_answer_whose_published_tokens_were_all_ends_without_a_new_one(
    num_published: int, lab: Lab
) -> None:
    whole = lab.alone(max_tokens=num_published)
    again = lab.sequence(max_tokens=num_published, forced=tuple(whole.token_ids))
    events = lab.engine().run(again)["a"]
    assert [(event.index, event.token_ids, event.text) for event in events] == [
        (num_published, (), "")
    ]
    assert report_of(events).text == whole.report.text
    assert report_of(events).completion_tokens == num_published


def test_the_report_counts_what_dycoke_kept(lab: Lab) -> None:
    c = lab.alone(num_frames=32, max_tokens=8).report.compression
    num_layers, per_frame = lab.num_layers, lab.tokens_per_frame
    pruned = math.floor(0.3 * per_frame)  # 14 of 49, 2 of 9
    num_in, num_prefill = 32 * per_frame, 8 * (per_frame + 3 * pruned)
    num_decode = math.floor(0.3 * num_prefill)
    assert (c.units, c.tokens_per_unit, c.visual_tokens_in) == (32, per_frame, num_in)
    assert c.pruned_layers == tuple(range(3, num_layers))
    assert c.kept_per_frame == (per_frame, pruned, pruned, pruned) * 8
    assert c.visual_tokens_prefill == num_prefill
    assert c.visual_tokens_decode == num_decode
    assert c.retained_ratio_prefill == num_prefill / num_in
    assert c.retained_ratio_decode == num_decode / num_in
    num_all_layers = 3 * num_prefill + (num_layers - 3) * num_decode
    assert c.retained_ratio_decode_all_layers == num_all_layers / (num_layers * num_in)
    assert c.decode_steps == 7
    assert c.exact_flops_actual < c.exact_flops_full
    assert c.paper_flops_actual < c.paper_flops_full


def test_the_report_counts_the_bytes_of_the_cache(lab: Lab) -> None:
    """Of the rows that decode steps read, whatever pages they lie in."""
    report = lab.alone(num_frames=32, max_tokens=8).report
    c, memory = report.compression, report.memory
    row = row_bytes(lab.model.text_geometry, torch.float32)
    num_layers, num_pruned_layers = lab.num_layers, lab.num_layers - 3
    num_rest = report.prompt_tokens - c.visual_tokens_prefill + 7
    full_layers = 3 * (c.visual_tokens_prefill + num_rest) * row
    pruned_layers = num_pruned_layers * (c.visual_tokens_decode + num_rest) * row
    assert memory.kv_bytes == full_layers + pruned_layers
    assert memory.dp_cache_bytes == num_pruned_layers * c.visual_tokens_prefill * row
    assert memory.kv_bytes_full_tokens == num_layers * (c.visual_tokens_in + num_rest) * row
    assert memory.peak_device_bytes > 0


def test_full_tokens_hold_what_full_tokens_hold(lab: Lab) -> None:
    report = lab.alone(compression="full").report
    assert report.memory.kv_bytes == report.memory.kv_bytes_full_tokens
    assert report.memory.dp_cache_bytes == 0
    assert report.compression.exact_flops_actual == report.compression.exact_flops_full
    assert report.compression.retained_ratio_decode_all_layers == 1.0


def test_stages_and_progress_can_be_followed(lab: Lab) -> None:
    engine = lab.engine(vision_batch_frames=4)
    sequence = lab.sequence(num_frames=8, max_tokens=3)
    engine.add(sequence)
    seen = [(sequence.stage, sequence.progress)]
    while engine.has_work:
        engine.step()
        seen.append((sequence.stage, sequence.progress))
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages == [
        Stage.WAITING,
        Stage.ENCODING,
        Stage.PREFILLING,
        Stage.DECODING,
        Stage.FINISHED,
    ]
    assert (Stage.ENCODING, 0.5) in seen


def test_timings_add_up(lab: Lab) -> None:
    t = lab.alone(max_tokens=5).report.timings
    work = t.waiting_s + t.vision_s + t.compress_s + t.prefill_s
    assert 0 < work <= t.first_token_s
    assert t.per_output_token_s is not None and 0 < t.per_output_token_s <= t.decode_s


def test_one_token_has_no_time_per_token(lab: Lab) -> None:
    assert lab.alone(max_tokens=1).report.timings.per_output_token_s is None


# --- what the engine refuses, whatever its backend ---


def test_frames_may_be_views_of_any_strides(engine: RecordingEngine) -> None:
    sequence = make_sequence(max_tokens=3)
    contiguous = sequence.frames
    engine.run(sequence)
    turned = make_sequence("turned", max_tokens=3)
    turned.frames = contiguous[..., ::-1].copy()[..., ::-1]
    engine.clear_caches()
    engine.run(turned)
    assert turned.output_token_ids == sequence.output_token_ids


def test_a_prompt_that_does_not_fit_is_refused(engine: RecordingEngine) -> None:
    with pytest.raises(PromptTooLongError, match="8192 positions"):
        engine.add(make_sequence(max_tokens=8192))
    assert not engine.has_work


@pytest.mark.parametrize("shape", [(8, 100, 100, 3), (0, 224, 224, 3), (8, 224, 224)])
def test_frames_of_another_size_are_refused(
    shape: tuple[int, ...], engine: RecordingEngine
) -> None:
    sequence = make_sequence()
    sequence.frames = np.zeros(shape, np.uint8)
    with pytest.raises(InvalidRequestError, match=r"224, 224, 3"):
        engine.add(sequence)


def test_frames_are_bytes(engine: RecordingEngine) -> None:
    sequence = make_sequence()
    sequence.frames = sequence.frames.astype(np.float32)  # type: ignore[assignment]
    with pytest.raises(InvalidRequestError, match="uint8"):
        engine.add(sequence)


def test_no_more_tokens_are_forced_than_the_answer_may_have(engine: RecordingEngine) -> None:
    with pytest.raises(InvalidRequestError, match="forced"):
        engine.add(make_sequence(max_tokens=3, forced=(7,) * 8))


def test_the_released_variant_needs_five_frames(engine: RecordingEngine) -> None:
    released = {"policy": "dycoke", "variant": "released"}
    with pytest.raises(InvalidRequestError, match="5 frames"):
        engine.add(make_sequence(num_frames=4, compression=released))
    report = report_of(engine.run(make_sequence(num_frames=5, compression=released))["a"])
    assert report.compression.kept_per_frame == (49, 14, 14, 14, 0)


def test_an_id_is_taken_once_at_a_time(engine: RecordingEngine) -> None:
    engine.add(make_sequence("twice"))
    with pytest.raises(InvalidRequestError, match="already"):
        engine.add(make_sequence("twice"))


def test_the_card_says_what_numerics_depend_on(engine: RecordingEngine) -> None:
    card = engine.card
    assert (card.device, card.dtype) == ("cpu", "float32")
    assert (card.image_size, card.tokens_per_frame, card.num_layers) == (224, 49, 6)
    assert (card.architecture, card.frames_per_unit) == (
        "LlavaOnevisionForConditionalGeneration",
        1,
    )
    assert (card.max_model_tokens, card.max_words_per_token) == (8192, 1)
    assert len(card.weights_digest) == 32


def test_an_engine_loads_from_a_directory() -> None:
    from dycoke_core.tiny import CHECKPOINT

    engine = Engine.from_pretrained(CHECKPOINT, EngineConfig(device="cpu"))
    assert engine.card.dtype == "float32", "float16 weights become float32 on a CPU"
