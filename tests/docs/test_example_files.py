"""`examples/`, run as they stand. Those that need curl, LiteLLM or LangChain: `make clients`."""

import re
import subprocess
import sys

import httpx
import pytest

from tests.serving import CLIP, PATIENCE_S, ROOT

ELSEWHERE = {"litellm_video.py", "langchain_video.py"}  # tests/clients/test_examples.py
QUESTION = "What happens in the video?"


def run(name: str, url: str) -> list[str]:
    """Returns the lines that it prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), url],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def answer(url: str) -> str:
    """What all of them ask for."""
    with CLIP.open("rb") as clip:
        fields = {"question": QUESTION, "max_tokens": "20", "stream": "false"}
        response = httpx.post(
            f"{url}/v1/video/chat", data=fields, files={"video": clip}, timeout=PATIENCE_S
        )
    text = str(response.raise_for_status().json()["text"])
    assert len(text.split()) > 3
    return text


def test_plain_python_shows_the_whole_answer_after_losing_the_connection(
    url: str, answer: str
) -> None:
    text, receipt = run("plain_python.py", url)
    assert text == answer and "% of the visual tokens kept" in receipt


def test_openai_streams(url: str, answer: str) -> None:
    text, receipt = run("openai_stream.py", url)
    assert text == answer and "% of the visual tokens kept" in receipt


def test_openai_uploads_and_deletes(url: str, answer: str) -> None:
    assert run("openai_files.py", url) == [answer, answer, "video_not_found"]


def test_every_example_is_run_and_listed() -> None:
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert scripts == {"plain_python.py", "openai_stream.py", "openai_files.py"} | ELSEWHERE
    listed = set(re.findall(r"^\| \[(\S+)\]", (ROOT / "examples/README.md").read_text(), re.M))
    assert listed == {path.name for path in (ROOT / "examples").iterdir()} - {"README.md"}
