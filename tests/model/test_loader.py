"""Loading: today's layout, the layout of 2024, and checkpoints that must be refused."""

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


def change_a_late_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def test_the_digest_changes_with_every_file_that_may_be_read(
    checkpoint: Path, random_checkpoint: Path
) -> None:
    assert weights_digest(checkpoint) == weights_digest(random_checkpoint)
    (checkpoint / "README.md").write_text("nothing that a model reads")
    assert weights_digest(checkpoint) == weights_digest(random_checkpoint)
    shards = load_file(checkpoint / "model.safetensors")
    save_file(shards, checkpoint / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    for name in ("special_tokens_map.json", "vocab.txt", "model.safetensors.index.json"):
        (checkpoint / name).write_text("{}\n")
    seen = {weights_digest(random_checkpoint), weights_digest(checkpoint)}
    files = sorted(file for file in checkpoint.iterdir() if file.suffix != ".md")
    names = {file.name for file in files}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    assert {"chat_template.jinja", "model.safetensors"} <= names
    for file in files:
        change_a_late_byte(file)
        seen.add(weights_digest(checkpoint))
    assert len(seen) == 2 + len(files)


def test_the_digest_sees_a_byte_in_the_middle_of_a_large_file(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(32 * 2**20))
    before = weights_digest(tmp_path)
    with weights.open("r+b") as stream:
        stream.seek(17 * 2**20 + 12345)
        stream.write(b"x")
    assert weights_digest(tmp_path) != before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "weights.pt"])
@pytest.mark.parametrize("has_safetensors", [True, False])
def test_pickled_weights_are_refused_beside_safetensors_and_instead(
    name: str, has_safetensors: bool, checkpoint: Path
) -> None:
    (checkpoint / name).write_bytes(b"cos\nsystem\n")
    if not has_safetensors:
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=rf"{name}.*only safetensors"):
        load_model(checkpoint)


# --- the hub ---


class Hub:
    """Stands for a hub that has one repository; a test has no network."""

    def __init__(self, copy: Path) -> None:
        self.copy = copy
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(
        self, repository: str, *, revision: str | None, allow_patterns: list[str]
    ) -> str:
        assert not any(pattern.endswith((".bin", ".py")) for pattern in allow_patterns)
        self.asked.append((repository, revision))
        return str(self.copy)


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(checkpoint)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


def test_a_hubs_model_is_fetched_at_the_revision_asked_for(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    load_model("org/model", device="cpu", revision="a" * 40)
    assert set(hub.asked) == {("org/model", "a" * 40)} and not caplog.records


def test_a_hubs_model_without_a_revision_is_named_in_a_warning(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    load_model("org/model", device="cpu")
    assert set(hub.asked) == {("org/model", None)}
    assert "not pinned" in caplog.text and hub.copy.name in caplog.text


def test_a_directory_has_no_revision(checkpoint: Path) -> None:
    with pytest.raises(ModelLoadError, match="no revision"):
        load_model(checkpoint, revision="a" * 40)
