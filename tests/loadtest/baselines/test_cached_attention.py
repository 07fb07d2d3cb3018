"""Plain generation over a cache that may be cut, against the engine."""

import torch

from dycoke_core.model.llava_onevision import LlavaOnevision
from loadtest.baselines.cached_attention import CachedAttention, generate, text_of
from tests.engine.recording import RecordingEngine, make_sequence, report_of
from tests.loadtest.baselines.prompts import NUM_FRAMES, prompt_of


def test_plain_generation_equals_the_engine_with_full_tokens(engine: RecordingEngine) -> None:
    sequence = make_sequence(video=3, num_frames=NUM_FRAMES, compression="full", max_tokens=10)
    report = report_of(engine.run(sequence)["a"])
    embeds, _ = prompt_of(engine.model)
    token_ids = generate(engine.model, embeds, CachedAttention(), max_tokens=10)
    assert token_ids == sequence.output_token_ids
    assert text_of(engine.model, token_ids) == report.text


def test_a_cut_cache_answers_as_a_new_one(tiny_model: LlavaOnevision) -> None:
    embeds, visual = prompt_of(tiny_model)
    whole = generate(tiny_model, embeds, CachedAttention(), max_tokens=8)
    attention = CachedAttention()
    prefix, question = embeds[: visual.stop], embeds[visual.stop :]
    with torch.inference_mode():
        tiny_model.forward(prefix, torch.arange(visual.stop)[None], attention)
    for _ in range(2):
        attention.cut(visual.stop)
        again = generate(tiny_model, question, attention, start=visual.stop, max_tokens=8)
        assert again == whole
