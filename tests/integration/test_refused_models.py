"""A model that cannot be served ends a command before it has started anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.workers import PATIENCE_S, ROOT

MIXTURE = {
    "model_type": "qwen3_vl_moe",
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
}
QUANTISED = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "quantization_config": {"quant_method": "awq", "bits": 4},
}


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (MIXTURE, "model type 'qwen3_vl_moe' is not supported"),
        (QUANTISED, "the checkpoint is quantised (awq)"),
    ],
    ids=["mixture of experts", "quantised"],
)
def test_a_refused_model_ends_the_command_with_one_line(
    config: dict[str, object], cause: str, command: str, tmp_path: Path
) -> None:
    """The directory has nothing but its configuration."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    env = os.environ | {
        "DYCOKE_MODEL": str(model),
        "DYCOKE_DATA_DIR": str(tmp_path / "data"),
        "DYCOKE_PORT": "0",
        "DYCOKE_WORKER_METRICS_PORT": "0",
    }
    if command == "worker":
        env["DYCOKE_REDIS_URL"] = "redis://127.0.0.1:1"  # which it never comes to need
    ended = subprocess.run(
        [sys.executable, "-m", "app", command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()  # no log of a child, no traceback
    assert line.startswith(f"dycoke: DYCOKE_MODEL: {cause}")
    assert str(config["architectures"][0]) in line  # type: ignore[index]
    assert "gemma3, llava_onevision, qwen2_5_vl, qwen3_vl" in line
    assert not (tmp_path / "data").exists(), "nothing was started"


def test_what_a_model_is_is_read_without_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    code = (
        "import sys; from app.__main__ import main; code = main(['serve']); "
        "assert code == 2; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    env = os.environ | {"DYCOKE_MODEL": str(tmp_path), "DYCOKE_DATA_DIR": str(tmp_path / "data")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, timeout=PATIENCE_S)
