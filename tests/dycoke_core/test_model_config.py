"""What is checked in a model's directory before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from dycoke_core.errors import ModelLoadError
from dycoke_core.model_config import SUPPORTED_TYPES, check_config, is_directory, read_json


def config(folder: Path, **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("model_type", SUPPORTED_TYPES)
def test_a_supported_type_is_told(tmp_path: Path, model_type: str) -> None:
    assert check_config(config(tmp_path, model_type=model_type)) == model_type


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2"}, "model type 'gpt2' is not supported; supported are: gemma3"),
        (
            {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoe"]},
            r"'qwen3_vl_moe' is not supported \(architecture Qwen3VLMoe\)",
        ),
        ({"architectures": []}, "model type 'None' is not supported;"),
        (
            {"model_type": "gemma3", "quantization_config": {"quant_method": "gptq"}},
            r"quantised \(gptq\)",
        ),
        (
            {"model_type": "gemma3", "text_config": {"quantization_config": {"bits": 4}}},
            r"quantised \(an unknown method\)",
        ),
        (
            {"model_type": "gemma3", "vision_config": {"compression_config": {"bits": 4}}},
            "unquantised repository",
        ),
    ],
)
def test_what_cannot_be_served_is_told_with_what_can(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        check_config(config(tmp_path, **settings))


def test_an_empty_part_of_a_configuration_says_nothing_of_quantisation(tmp_path: Path) -> None:
    settings = {"model_type": "gemma3", "text_config": None, "quantization_config": None}
    assert check_config(config(tmp_path, **settings)) == "gemma3"


def test_a_directory_without_a_configuration_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        check_config(tmp_path)
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        check_config(config(tmp_path))


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "not a JSON obj")])
def test_a_file_that_is_no_object_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "settings.json"
    assert read_json(file) == {} == read_json(tmp_path)
    file.write_text(text)
    with pytest.raises(ModelLoadError, match=rf"settings\.json is {message}"):
        read_json(file)


def test_a_name_of_a_hub_is_no_directory(tmp_path: Path) -> None:
    assert is_directory(tmp_path) and not is_directory("org/name")
    with pytest.raises(ModelLoadError, match="cannot be read: File name too long"):
        is_directory("x" * 5000)
