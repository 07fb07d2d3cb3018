"""Directories laid out as the hub has them: heads that are the embedding, weights in several files
under an index, and Gemma 3's configuration and names of its first releases."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.model.loader import load_model
from dycoke_core.sequence import Sequence
from tests.engine.bench import Bench
from tests.engine.families import SETTINGS, gemma_sequence, qwen_sequence
from tests.engine.family_checks import assert_equals_generate
from tests.engine.gemma_reference import GemmaReference
from tests.engine.qwen_reference import Qwen3Reference, QwenReference
from tests.engine.recording import assert_same_logits
from tests.random_gemma import WINDOW, build_random_gemma3
from tests.random_qwen import build_random_qwen2_5_vl, build_random_qwen3_vl

FAMILIES: dict[str, tuple[Callable[..., None], Callable[[Path], Any]]] = {
    "qwen2_5_vl": (build_random_qwen2_5_vl, QwenReference),
    "qwen3_vl": (build_random_qwen3_vl, Qwen3Reference),
    "gemma3": (build_random_gemma3, GemmaReference),
}
NUM_SHARDS = 3


def shard(directory: Path) -> dict[str, str]:
    """Parts the weights among several files. Returns the index's map from tensors to files."""
    whole = directory / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = [f"model-{n + 1:05}-of-{NUM_SHARDS:05}.safetensors" for n in range(NUM_SHARDS)]
    weight_map = {name: names[n % NUM_SHARDS] for n, name in enumerate(sorted(tensors))}
    for file in names:
        own = {name: tensors[name] for name, where in weight_map.items() if where == file}
        save_file(own, directory / file, metadata={"format": "pt"})
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def bench(directory: Path) -> Bench[VideoLanguageModel]:
    model = load_model(directory, device="cpu", dtype="float32")
    sequence: Callable[..., Sequence] = gemma_sequence
    if "qwen" in model.model.config.model_type:
        sequence = partial(qwen_sequence, model)
    return Bench(model, "cpu", sequence, SETTINGS)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_tied_checkpoint_in_shards_equals_transformers(family: str, tmp_path: Path) -> None:
    build, reference = FAMILIES[family]
    build(tmp_path, is_tied=True)
    expected = reference(tmp_path)  # of one file
    weight_map = shard(tmp_path)
    assert not any("lm_head" in name for name in weight_map)
    over = bench(tmp_path)
    head = over.model.model.get_output_embeddings().weight
    assert head is over.model.model.get_input_embeddings().weight
    asked = over.sequence(compression="full", max_tokens=8, ignore_eos=True)
    expected.model.generation_config.eos_token_id = None
    assert_equals_generate(asked, over, expected)
    over.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shard_that_is_missing_is_no_complete_checkpoint(family: str, tmp_path: Path) -> None:
    build, _ = FAMILIES[family]
    build(tmp_path, is_tied=True)
    weight_map = shard(tmp_path)
    (tmp_path / weight_map[min(weight_map)]).unlink()
    with pytest.raises(ModelLoadError, match="no complete set of weights"):
        load_model(tmp_path, device="cpu", dtype="float32")


# --- Gemma 3 as it was first published ---

PATTERN = 3  # every third layer attends to everything


def to_first_configuration(directory: Path) -> None:
    """No `layer_types` and no `rope_parameters`; nothing says that the head is tied."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    assert text.pop("layer_types")[:PATTERN] == ["sliding_attention"] * 2 + ["full_attention"]
    text["sliding_window_pattern"] = PATTERN
    text["rope_theta"] = rope["full_attention"]["rope_theta"]
    text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    text["rope_scaling"] = {"factor": rope["full_attention"]["factor"], "rope_type": "linear"}
    for part in (config, text):
        part.pop("tie_word_embeddings", None)
        part["torch_dtype"] = part.pop("dtype", "float32")
    file.write_text(json.dumps(config))


def to_first_names(directory: Path) -> None:
    """Of the tensors."""
    file, renamed = directory / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        first = name.removeprefix("model.")
        if first.startswith("language_model.") and not first.startswith("language_model.model."):
            first = f"language_model.model.{first.removeprefix('language_model.')}"
        if first.startswith("vision_tower.") and "vision_model" not in first:
            first = f"vision_tower.vision_model.{first.removeprefix('vision_tower.')}"
        renamed[first] = tensor
    assert {
        "language_model.model.embed_tokens.weight",
        "multi_modal_projector.mm_input_projection_weight",
        "vision_tower.vision_model.post_layernorm.weight",
    } <= set(renamed)
    save_file(renamed, file, metadata={"format": "pt"})


def test_gemma_as_first_published_is_the_same_model(tmp_path: Path) -> None:
    build_random_gemma3(tmp_path, is_tied=True)
    expected = bench(tmp_path)
    to_first_configuration(tmp_path)
    to_first_names(tmp_path)
    first = bench(tmp_path)
    windows = [spec.window for spec in first.model.layers]
    assert windows == [WINDOW, WINDOW, None] * 2 == [spec.window for spec in expected.model.layers]
    weights = first.model.model.state_dict()
    for name, tensor in expected.model.model.state_dict().items():
        assert torch.equal(weights[name], tensor)
    ask = {"max_tokens": 16, "ignore_eos": True}
    ours, theirs = (each.alone(**ask).recording.logits for each in (first, expected))
    assert_same_logits(ours, theirs)
    assert first.model.weights_digest != expected.model.weights_digest
