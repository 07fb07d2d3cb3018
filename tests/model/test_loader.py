"""Loading: today's layout, that of 2024, and checkpoints that must be refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dycoke_core.config import EngineConfig
from dycoke_core.errors import ModelLoadError
from dycoke_core.model.checkpoint import weights_digest
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from tests.engine.recording import RecordingEngine, assert_same_logits, make_sequence


@pytest.fixture
def checkpoint(tmp_path: Path, random_checkpoint: Path) -> Path:
    return Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rename_tensors(checkpoint: Path, **prefixes: str) -> None:
    """Replaces the first matching prefix of each tensor's name."""
    file, renamed = checkpoint / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        renamed[prefixes.get(old, "") + name.removeprefix(old)] = tensor
    save_file(renamed, file, metadata={"format": "pt"})


def to_layout_of_2024(checkpoint: Path) -> None:
    """Key names, processor and template files as in the llava-hf repositories of 2024."""
    rename_tensors(checkpoint, vision_tower="vision_tower.vision_model")
    template = (checkpoint / "chat_template.jinja").read_text()
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (checkpoint / "processor_config.json").unlink()
    half = [0.5, 0.5, 0.5]
    settings = {"image_mean": half, "image_std": half, "rescale_factor": 1 / 255}
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(settings))
    tensors = load_file(checkpoint / "model.safetensors")
    for name in (
        "image_newline",
        "language_model.lm_head.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    ):
        assert name in tensors


def to_module_names(checkpoint: Path) -> None:
    """Key names that equal the modules' own, as some releases of transformers have written."""
    names = ("image_newline", "multi_modal_projector", "vision_tower")
    renamed = {name: f"model.{name}" for name in names}
    renamed["language_model.lm_head"] = "lm_head"
    rename_tensors(checkpoint, **renamed, **{"language_model.model": "model.language_model"})
    assert "model.language_model.norm.weight" in load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize("change_layout", [to_layout_of_2024, to_module_names])
def test_every_layout_gives_the_same_logits(
    change_layout: Callable[[Path], None], checkpoint: Path, tiny_model: LlavaOnevision
) -> None:
    change_layout(checkpoint)
    engines = [
        RecordingEngine(model, EngineConfig())
        for model in (tiny_model, load_model(checkpoint, device="cpu", dtype="float32"))
    ]
    for engine in engines:
        engine.run(make_sequence())
    assert_same_logits(engines[1].recordings["a"].logits, engines[0].recordings["a"].logits)


@pytest.mark.parametrize(
    ("dtype", "loaded"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_weights_come_in_the_dtype_asked_for(
    dtype: str, loaded: torch.dtype, random_checkpoint: Path
) -> None:
    model = load_model(random_checkpoint, device="cpu", dtype=dtype)
    assert model.dtype is loaded
    assert all(parameter.dtype is loaded for parameter in model.model.parameters())
    hidden = torch.zeros(1, model.text_geometry.hidden_size, dtype=loaded)
    assert model.model.lm_head(hidden).dtype is loaded


def test_a_bfloat16_model_answers(random_checkpoint: Path) -> None:
    model = load_model(random_checkpoint, device="cpu", dtype="bfloat16")
    engine = RecordingEngine(model, EngineConfig())
    events = engine.run(make_sequence(max_tokens=5))["a"]
    assert len(events) == 5 and events[-1].report is not None


def test_a_missing_tensor_is_not_filled_with_random_numbers(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["language_model.model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"layers\.2\.mlp\.up_proj"):
        load_model(checkpoint)


def test_a_misshapen_tensor_is_refused(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["language_model.lm_head.weight"] = torch.zeros(3, 128, dtype=torch.float16)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError):
        load_model(checkpoint)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_directory_without_one_of_its_files_is_refused(file: str, checkpoint: Path) -> None:
    (checkpoint / file).unlink()
    with pytest.raises(ModelLoadError):
        load_model(checkpoint)


def test_a_directory_without_a_chat_template_is_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(ModelLoadError, match="chat template"):
        load_model(checkpoint)


def test_another_kind_of_model_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ModelLoadError, match="'qwen2' is not supported"):
        load_model(checkpoint)


def test_a_refusal_names_the_architecture_and_what_is_supported(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", model_type="idefics3", architectures=["Idefics3ForX"])
    with pytest.raises(ModelLoadError, match=r"Idefics3ForX.*supported are: .*llava_onevision"):
        load_model(checkpoint)


def test_a_model_that_transformers_does_not_know_is_refused_alike(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", model_type="of_tomorrow")
    with pytest.raises(ModelLoadError, match=r"'of_tomorrow' is not supported"):
        load_model(checkpoint)


@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_quantised_checkpoint_is_refused_before_its_weights_are_read(
    part: str | None, checkpoint: Path
) -> None:
    file, quantization = checkpoint / "config.json", {"quant_method": "awq", "bits": 4}
    settings = json.loads(file.read_text())
    (settings if part is None else settings[part])["quantization_config"] = quantization
    file.write_text(json.dumps(settings))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"quantised \(awq\).*unquantised"):
        load_model(checkpoint)


def test_a_configuration_that_is_no_object_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"config\.json is not a JSON object"):
        load_model(checkpoint)


@pytest.mark.parametrize("path", ["/does/not/exist", "./nowhere"])
def test_a_directory_that_is_not_there_is_named_as_such(path: str) -> None:
    with pytest.raises(ModelLoadError, match="does not exist"):
        load_model(path)


def test_end_tokens_come_from_the_generation_config(checkpoint: Path) -> None:
    edit_json(checkpoint / "generation_config.json", eos_token_id=[2, 7])
    assert load_model(checkpoint).eos_token_ids == {2, 7}
    (checkpoint / "generation_config.json").unlink()
    assert load_model(checkpoint).eos_token_ids == {2}


def test_the_digest_names_the_weights(checkpoint: Path, random_checkpoint: Path) -> None:
    assert weights_digest(checkpoint) == weights_digest(random_checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["language_model.lm_head.weight"][-1, -1] += 1
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert weights_digest(checkpoint) != weights_digest(random_checkpoint)
