"""The engine's invariants (float32, random weights): logits and kept sets, not tokens alone.

Each is written once and holds on every backend.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dycoke_core.compression import randomness
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.preprocess import Prompt
from dycoke_core.sequence import ChatMessage, Sequence
from tests.compression import slow_loops
from tests.engine.lab import Lab
from tests.engine.recording import assert_same, assert_same_logits, report_of

QUESTION = "What color is the circle?"
# Longer than a small chunk: 30 tokens and more.
LONG_QUESTION = " ".join([QUESTION, "How many objects move up?", "Does the red square blink?"])


def reference_inputs(model: LlavaOnevision, sequence: Sequence) -> dict[str, Tensor]:
    """What a processor would hand to transformers: expanded ids and normalised frames."""
    prompt = model.prompt_encoder(sequence.messages)
    num_visual = len(sequence.frames) * model.tokens_per_frame + 1
    video = (model.model.config.video_token_id,) * num_visual
    ids = torch.tensor([[*prompt.ids_before_video, *video, *prompt.ids_after_video]])
    pixels = model.normalizer(torch.from_numpy(sequence.frames), torch.float32)
    return {"input_ids": ids, "pixel_values_videos": pixels[None]}


@pytest.mark.parametrize("num_frames", [1, 5, 32])
def test_full_tokens_equal_transformers_greedy_generate(num_frames: int, lab: Lab) -> None:
    engine = lab.engine()
    sequence = lab.sequence(
        num_frames=num_frames, compression="full", max_tokens=24, question=QUESTION
    )
    events = engine.run(sequence)["a"]
    inputs = reference_inputs(lab.reference_model, sequence)
    expected = lab.transformers_model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=24,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    num_prompt = inputs["input_ids"].shape[1]
    assert report_of(events).prompt_tokens == num_prompt
    assert sequence.output_token_ids == expected.sequences[0, num_prompt:].tolist()
    assert_same_logits(engine.recordings["a"].logits, [step[0] for step in expected.logits])


@pytest.mark.parametrize("layer", range(8))
def test_dycoke_that_drops_nothing_equals_full_tokens(layer: int, lab: Lab) -> None:
    """Whichever layer is the first one pruned, and where none is."""
    full = lab.alone(compression="full")
    none = lab.alone(compression={"policy": "dycoke", "k": 0.0, "p": 0.0, "l": layer})
    assert_same_logits(none.recording.logits, full.recording.logits)


# --- kept sets ---

STAGES = [
    {},  # the defaults
    {"threshold": 0.1},  # a gate that keeps most selections
    {"k": 0.0, "l": 1, "p": 0.9},
    {"k": 0.9, "l": -1, "p": 0.5},  # only the last layer is pruned
    {"k": 0.5, "l": 0, "threshold": 0.1},  # layer 0 scores before its own pruning
    {"l": 2, "p": 1.0},  # no visual token is left
    {"l": 2, "p": 0.0},  # all are
]


@pytest.mark.parametrize("num_frames", [1, 7])
@pytest.mark.parametrize("settings", STAGES, ids=str)
@torch.inference_mode()
def test_both_stages_equal_slow_loops(
    settings: dict[str, float], num_frames: int, lab: Lab
) -> None:
    layer = settings.get("l", 3) % lab.num_layers
    compression = {"policy": "dycoke", **settings, "l": layer}
    sequence = lab.sequence(compression=compression, num_frames=num_frames, max_tokens=10)
    k = settings.get("k", 0.7)
    assert_equals_slow_loops(lab, sequence, lambda features: slow_loops.ttm(features, k))


def random_order(seed: int, counter: int, count: int) -> list[int]:
    return randomness.random_order(seed, counter, count, torch.device("cpu")).tolist()


def random_ttm(features: Tensor) -> list[int]:
    """Seed 5, k = 0.7, over 7 frames."""
    num_tokens = features.shape[1]
    kept = []
    for frame in range(7):
        order = random_order(5, frame, num_tokens)
        places = range(num_tokens) if frame % 4 == 0 else order[: slow_loops.share(0.7, num_tokens)]
        kept += sorted(frame * num_tokens + place for place in places)
    return kept


def fewer_frames(features: Tensor) -> list[int]:
    """7 frames keep under TTM (of 49 tokens 168, of 9 tokens 28) about as many as 3 have."""
    num_tokens = features.shape[1]
    return [frame * num_tokens + place for frame in (0, 3, 6) for place in range(num_tokens)]


CONTROLS: dict[str, dict[str, object]] = {
    "random_ttm": {"seed": 5},
    "fewer_frames": {},
    "vidcom2": {"retained_ratio": 0.4},
    "dycoke_one_shot": {},
    "random_kv": {"seed": 5, "threshold": 0.1},
    "lowest_kv": {},
}


@pytest.mark.parametrize("policy", CONTROLS)
@torch.inference_mode()
def test_controls_equal_slow_loops(policy: str, lab: Lab) -> None:
    sequence = lab.sequence(
        compression={"policy": policy, **CONTROLS[policy]}, num_frames=7, max_tokens=10
    )
    selectors = {
        "random_ttm": random_ttm,
        "fewer_frames": fewer_frames,
        "vidcom2": lambda features: slow_loops.vidcom2(features, 0.4),
    }
    choices = {
        "random_kv": lambda scores, m, step: sorted(random_order(5, step, len(scores))[:m]),
        "lowest_kv": slow_loops.lowest,
    }
    assert_equals_slow_loops(
        lab,
        sequence,
        selectors.get(policy, lambda features: slow_loops.ttm(features, 0.7)),
        choose=choices.get(policy, slow_loops.highest),
    )


def assert_equals_slow_loops(
    lab: Lab,
    sequence: Sequence,
    select: Callable[[Tensor], list[int]],
    choose: Callable[[Tensor, int, int], list[int]] = slow_loops.highest,
) -> None:
    """Runs the sequence; its logits, kept sets and refreshes are those of plain loops."""
    engine = lab.engine()
    report = report_of(engine.run(sequence)["a"])
    model, compression = lab.reference_model, sequence.compression
    *_, features = model.encode_frames(torch.from_numpy(sequence.frames))
    assert features is not None
    kept = select(features)
    assert report.compression.visual_tokens_prefill == len(kept)
    prompt = model.prompt_encoder(sequence.messages)
    prefix, _ = model.embed_prefix(prompt.ids_before_video, features.flatten(0, 1)[kept])
    embeds = torch.cat([prefix, model.embed_tokens(prompt.ids_after_video)])
    first_visual = len(prompt.ids_before_video)
    has_stage_two = compression.policy != "vidcom2"
    slow = slow_loops.SlowStageTwo(
        list(range(first_visual, first_visual + len(kept))),
        layer=compression.l if has_stage_two else lab.num_layers,
        p=compression.p,
        threshold=None if compression.policy == "dycoke_one_shot" else compression.threshold,
        choose=choose,
    )
    logits = slow_loops.decode_slowly(model, embeds, sequence.output_token_ids, slow)

    recording, num_steps = engine.recordings["a"], len(logits) - 1
    if has_stage_two:
        num_steps = lab.agreed_steps(recording, slow)
    assert_same_logits(recording.logits[: num_steps + 1], logits[: num_steps + 1])
    if num_steps == len(logits) - 1:
        assert report.compression.refreshes == (slow.num_refreshes if has_stage_two else 0)


def test_the_random_models_keep_some_selections_and_change_others(lab: Lab) -> None:
    """Otherwise the tests of the gate above would prove nothing."""
    ask = {"compression": {"policy": "dycoke", "threshold": 0.1}, "num_frames": 7, "max_tokens": 10}
    answer = lab.alone(**ask)
    counts = answer.report.compression
    assert 0 < counts.refreshes < counts.decode_steps - 1
    first, *others = answer.recording.kept
    assert any(not torch.equal(first, other) for other in others)


# --- company, chunks, replays ---


def mix(lab: Lab) -> dict[str, dict[str, object]]:
    """Every policy, sampler and length, three videos, and an answer that is resumed."""
    last = lab.num_layers - 1
    published = tuple(lab.alone(video=3).token_ids[:5])
    return {
        "full": {"compression": "full", "video": 1},
        "default": {"video": 2, "num_frames": 5, "max_tokens": 20},
        "sampled": {"video": 3, "temperature": 0.8, "top_p": 0.9, "seed": 7},
        "long": {"num_frames": 32, "question": LONG_QUESTION},
        "short": {"num_frames": 1, "max_tokens": 1},
        "layer 0": {"video": 2, "compression": {"policy": "dycoke", "l": 0}},
        "layer 1": {"video": 2, "compression": {"policy": "dycoke", "l": 1, "threshold": 0.1}},
        "last layer": {"video": 2, "compression": {"policy": "dycoke", "l": last}},
        "no layer": {"video": 2, "compression": {"policy": "dycoke", "l": 9}},
        "random": {"video": 2, "compression": {"policy": "random_kv", "seed": 3}},
        "random too": {"compression": {"policy": "random_kv", "seed": 4, "p": 0.9}},
        "random none": {"compression": {"policy": "random_kv", "p": 1.0, "l": 0}},
        "lowest": {"video": 2, "compression": {"policy": "lowest_kv", "threshold": 0.1}},
        "one shot": {"video": 2, "compression": "dycoke_one_shot"},
        "no visual token": {"compression": {"policy": "vidcom2", "retained_ratio": 0}},
        "none kept": {"video": 2, "compression": {"policy": "dycoke", "p": 1.0, "l": 1}},
        "one frame": {"num_frames": 1, "compression": {"policy": "dycoke", "l": 0, "p": 0.5}},
        "resumed": {"video": 3, "forced": published},
    }


@pytest.mark.parametrize("dp_cache", ["device", "host"])
def test_sequences_side_by_side_equal_single_runs(dp_cache: str, lab: Lab) -> None:
    asks = mix(lab)
    together = lab.engine(max_running_sequences=3, dp_cache=dp_cache)
    together.run(*(lab.sequence(name, **ask) for name, ask in asks.items()))
    for name, ask in asks.items():
        assert_same(together.recordings[name], lab.alone(**ask).recording)


@pytest.mark.parametrize("chunk_tokens", [7, 37])
@pytest.mark.parametrize("compression", ["full", "dycoke", {"policy": "dycoke", "l": 0}], ids=str)
def test_chunked_prefill_equals_whole_prefill(
    compression: str, chunk_tokens: int, lab: Lab
) -> None:
    """Chunks end inside the prefix, and the short ones inside the question."""
    ask = {"compression": compression, "question": LONG_QUESTION}
    engine = lab.engine(prefill_chunk_tokens=chunk_tokens)
    engine.run(lab.sequence("a", **ask), lab.sequence("b", video=2, **ask))
    assert_same(engine.recordings["a"], lab.alone(**ask).recording)
    assert_same(engine.recordings["b"], lab.alone(video=2, **ask).recording)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "full"},
        {"policy": "dycoke", "threshold": 0.9},
        {"policy": "dycoke", "threshold": 0.1},
        {"policy": "dycoke", "threshold": 0.1, "l": 0},
        {"policy": "random_kv", "threshold": 0.1, "seed": 2},
        {"policy": "dycoke_one_shot"},
        {"policy": "random_ttm", "seed": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_published", [1, 5, 11])
def test_a_replayed_answer_continues_as_if_undisturbed(
    num_published: int, settings: dict[str, object], lab: Lab
) -> None:
    torch.manual_seed(num_published)  # nothing may depend on it
    ask = {"compression": settings, "max_tokens": 12, "temperature": 0.7, "seed": 3}
    whole = lab.alone(**ask)
    resumed = lab.sequence(**ask, forced=tuple(whole.token_ids[:num_published]))
    engine = lab.engine()
    events = engine.run(resumed)["a"]

    assert resumed.output_token_ids == whole.token_ids
    assert [event.index for event in events] == list(range(num_published, 12))
    assert len(whole.token_ids) == 12
    recording = engine.recordings["a"]
    assert_same_logits(recording.logits, whole.recording.logits[num_published:])
    assert [kept.tolist() for kept in recording.kept] == [k.tolist() for k in whole.recording.kept]
    assert recording.refreshes == whole.recording.refreshes
    assert report_of(events).text == whole.report.text


class PromptWithAnswer:
    """A prompt encoder that appends an answer's ids to the prompt, to be prefilled."""

    def __init__(self, model: LlavaOnevision, answer: list[int]) -> None:
        self.tokenizer = model.prompt_encoder.tokenizer
        self._encoder, self._answer = model.prompt_encoder, answer

    def __call__(self, messages: tuple[ChatMessage, ...], **options: Any) -> Prompt:
        prompt = self._encoder(messages, **options)
        return Prompt(prompt.ids_before_video, (*prompt.ids_after_video, *self._answer))


@pytest.mark.parametrize(("compression", "is_same"), [("full", True), ("dycoke", False)])
def test_prefilling_an_answer_is_no_replay_of_it_where_stage_two_prunes(
    compression: str, is_same: bool, lab: Lab
) -> None:
    """Keys of generated tokens depend on the kept sets of their steps, so failover replays them."""
    # The last layer's keys show in no later layer.
    settings = {"policy": compression} | ({} if is_same else {"l": 1, "p": 0.9})
    whole = lab.alone(compression=settings)
    model = replace_prompt_encoder(lab.model, whole.token_ids[:8])
    prefilled = lab.engine(model)
    prefilled.run(lab.sequence(compression=settings, max_tokens=4))
    # The first token after a prefill sees all; pruning shows from the second on.
    ours, theirs = prefilled.recordings["a"].logits[1:], whole.recording.logits[9:]
    differences = [
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    ]
    assert (max(differences) < 1e-4) is is_same


def replace_prompt_encoder(model: LlavaOnevision, answer: list[int]) -> LlavaOnevision:
    return LlavaOnevision(
        model.model,
        PromptWithAnswer(model, answer),  # type: ignore[arg-type]
        model.normalizer,
        model.eos_token_ids,
        model.weights_digest,
    )
