"""The examples that need the clients of this environment, run as they stand."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.serving import PATIENCE_S, ROOT


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["litellm_video.py", "langchain_video.py"])
def test_python(name: str, url: str, expected: Any) -> None:
    assert run(sys.executable, f"examples/{name}", url) == expected["text"] + "\n"


def test_curl(url: str, expected: Any) -> None:
    stream, _, whole = run("bash", "examples/curl.sh", url).rpartition("\n\n")
    assert json.loads(stream.rsplit("data: ", 1)[1])["text"] == expected["text"]
    assert json.loads(whole)["choices"][0]["message"]["content"] == expected["text"]
