"""The bundled checkpoint: reproducible, small, and of answers that vary."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from dycoke_core.config import EngineConfig
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.tiny.build import CHECKPOINT, build
from tests.engine.recording import RecordingEngine, make_sequence


def test_the_script_makes_the_bundled_checkpoint(tmp_path: Path) -> None:
    build(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f.name for f in CHECKPOINT.iterdir()}
    made = load_file(tmp_path / "model.safetensors")
    bundled = load_file(CHECKPOINT / "model.safetensors")
    assert made.keys() == bundled.keys()
    for name, tensor in made.items():
        assert torch.equal(tensor, bundled[name]), name
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json"):
        assert (tmp_path / name).read_text() == (CHECKPOINT / name).read_text()


def test_it_is_small_but_deep_enough_for_both_stages(tiny_model: LlavaOnevision) -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 10 * 2**20
    assert tiny_model.text_geometry.num_layers >= 6
    assert tiny_model.text_geometry.num_heads > tiny_model.text_geometry.num_kv_heads


def test_answers_vary_by_step_video_and_question(tiny_model: LlavaOnevision) -> None:
    engine = RecordingEngine(tiny_model, EngineConfig())
    questions = ("Describe the video.", "How many red objects are there in the video?")
    sequences = [
        make_sequence(f"{video}{policy}{question}", video=video, question=question,
                      compression=policy, num_frames=16, max_tokens=30)
        for video in (1, 2, 3)
        for question in questions
        for policy in ("full", "dycoke")
    ]  # fmt: skip
    engine.run(*sequences)
    answers = [tuple(sequence.output_token_ids) for sequence in sequences]
    assert len(set(answers)) == len(answers)
    assert all(len(set(answer)) >= 8 for answer in answers), "no answer repeats a few words"
