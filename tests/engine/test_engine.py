"""The engine's contract: events, limits, finish reasons and what a report says."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dycoke_core.config import EngineConfig
from dycoke_core.engine import Engine
from dycoke_core.engine.budget import row_bytes
from dycoke_core.errors import InvalidRequestError, PromptTooLongError
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import FinishReason, Stage
from tests.engine.recording import RecordingEngine, make_sequence, report_of


def test_events_number_the_tokens_and_their_text_is_the_answer(engine: RecordingEngine) -> None:
    sequence = make_sequence(max_tokens=10)
    events = engine.run(sequence)["a"]
    assert [event.index for event in events] == list(range(10))
    assert [event.token_ids for event in events] == [(i,) for i in sequence.output_token_ids]
    assert [event.finish_reason for event in events] == [None] * 9 + [FinishReason.LENGTH]
    report = report_of(events)
    assert "".join(event.text for event in events) == report.text
    tokenizer: PreTrainedTokenizerFast = engine.model.prompt_encoder.tokenizer
    assert report.text == tokenizer.decode(sequence.output_token_ids)
    assert sequence.stage is Stage.FINISHED


def test_frames_may_be_views_of_any_strides(engine: RecordingEngine) -> None:
    sequence = make_sequence(max_tokens=3)
    contiguous = sequence.frames
    engine.run(sequence)
    turned = make_sequence("turned", max_tokens=3)
    turned.frames = contiguous[..., ::-1].copy()[..., ::-1]
    engine.clear_caches()
    engine.run(turned)
    assert turned.output_token_ids == sequence.output_token_ids


def test_an_end_token_stops_the_answer(tiny_model: LlavaOnevision) -> None:
    first = make_sequence(max_tokens=12)
    RecordingEngine(tiny_model, EngineConfig()).run(first)
    end_token = first.output_token_ids[5]
    place = first.output_token_ids.index(end_token)

    model = LlavaOnevision(
        tiny_model.model,
        tiny_model.prompt_encoder,
        tiny_model.normalizer,
        frozenset([end_token]),
        tiny_model.weights_digest,
    )
    second = make_sequence(max_tokens=12)
    events = RecordingEngine(model, EngineConfig()).run(second)["a"]
    assert events[-1].finish_reason is FinishReason.STOP
    assert second.output_token_ids == first.output_token_ids[: place + 1]


def test_a_stop_string_is_cut_off_with_all_behind_it(tiny_model: LlavaOnevision) -> None:
    plain = RecordingEngine(tiny_model, EngineConfig()).run(make_sequence(max_tokens=12))["a"]
    text = report_of(plain).text
    stop = text[20:24]
    events = RecordingEngine(tiny_model, EngineConfig()).run(
        make_sequence(max_tokens=12, stop=(stop,))
    )["a"]
    assert events[-1].finish_reason is FinishReason.STOP
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    assert len(events) < 12


def test_an_answer_whose_published_tokens_were_all_ends_without_a_new_one(
    tiny_model: LlavaOnevision,
) -> None:
    whole = make_sequence(max_tokens=6)
    report = report_of(RecordingEngine(tiny_model, EngineConfig()).run(whole)["a"])
    again = make_sequence(max_tokens=6, forced=tuple(whole.output_token_ids))
    events = RecordingEngine(tiny_model, EngineConfig()).run(again)["a"]
    assert [(event.index, event.token_ids, event.text) for event in events] == [(6, (), "")]
    assert report_of(events).text == report.text
    assert report_of(events).completion_tokens == 6


def test_the_report_counts_what_dycoke_kept(engine: RecordingEngine) -> None:
    report = report_of(engine.run(make_sequence(num_frames=32, max_tokens=8))["a"])
    c = report.compression
    kept_per_window = (49, 14, 14, 14)  # floor(0.3 * 49) = 14
    assert c.visual_tokens_in == 1568
    assert c.kept_per_frame == kept_per_window * 8
    assert c.visual_tokens_prefill == 728
    assert c.visual_tokens_decode == 218
    assert c.retained_ratio_prefill == 728 / 1568
    assert c.retained_ratio_decode == 218 / 1568
    assert c.retained_ratio_decode_all_layers == (3 * 728 + 3 * 218) / (6 * 1568)
    assert c.decode_steps == 7
    assert c.exact_flops_actual < c.exact_flops_full
    assert c.paper_flops_actual < c.paper_flops_full


def test_the_report_counts_the_bytes_of_the_cache(engine: RecordingEngine) -> None:
    report = report_of(engine.run(make_sequence(num_frames=32, max_tokens=8))["a"])
    row = row_bytes(engine.model.text_geometry, torch.float32)
    num_text = report.prompt_tokens - 728
    full_layers = 3 * (728 + num_text + 7) * row
    pruned_layers = 3 * (218 + num_text + 7) * row
    assert report.memory.kv_bytes == full_layers + pruned_layers
    assert report.memory.dp_cache_bytes == 3 * 728 * row
    assert report.memory.kv_bytes_full_tokens == 6 * (1568 + num_text + 7) * row
    assert report.memory.peak_device_bytes > 0


def test_full_tokens_hold_what_full_tokens_hold(engine: RecordingEngine) -> None:
    report = report_of(engine.run(make_sequence(compression="full"))["a"])
    assert report.memory.kv_bytes == report.memory.kv_bytes_full_tokens
    assert report.memory.dp_cache_bytes == 0
    assert report.compression.exact_flops_actual == report.compression.exact_flops_full
    assert report.compression.retained_ratio_decode_all_layers == 1.0


def test_stages_and_progress_can_be_followed(engine: RecordingEngine) -> None:
    sequence = make_sequence(num_frames=8, max_tokens=3)
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


def test_timings_add_up(engine: RecordingEngine) -> None:
    report = report_of(engine.run(make_sequence(max_tokens=5))["a"])
    t = report.timings
    work = t.waiting_s + t.vision_s + t.compress_s + t.prefill_s
    assert 0 < work <= t.first_token_s
    assert t.per_output_token_s is not None and 0 < t.per_output_token_s <= t.decode_s


def test_one_token_has_no_time_per_token(engine: RecordingEngine) -> None:
    report = report_of(engine.run(make_sequence(max_tokens=1))["a"])
    assert report.timings.per_output_token_s is None


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


def test_a_lost_device_ends_the_engine_not_one_sequence(
    tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(LlavaOnevision, "forward", lose)
    engine = RecordingEngine(tiny_model, EngineConfig())
    engine.add(make_sequence())
    with pytest.raises(RuntimeError, match="CUDA error"):
        engine.drain()


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
    assert card.max_model_tokens == 8192
    assert len(card.weights_digest) == 32


def test_an_engine_loads_from_a_directory() -> None:
    from dycoke_core.tiny import CHECKPOINT

    engine = Engine.from_pretrained(CHECKPOINT, EngineConfig(device="cpu"))
    assert engine.card.dtype == "float32", "float16 weights become float32 on a CPU"
