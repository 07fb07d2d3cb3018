"""lmms-eval's own model for servers like OpenAI's, on a running service: `make lmms-eval`.

With `pass_video_url` it names a video by a `file:` URL and the number of frames in
`media_io_kwargs`. Without it, it sends frames as images, which this service does not take.
"""

from pathlib import Path

import httpx
import pytest

from tests.lmms_plugin.running import MAX_TOKENS, Doc, answers_of, needs_lmms_eval, run_lmms_eval
from tests.serving import PATIENCE_S, ROOT, running_service

pytestmark = [needs_lmms_eval, pytest.mark.timeout(400)]

NUM_FRAMES = 8


def expected_answers(url: str, docs: list[Doc]) -> list[str]:
    """The same questions on the service's own surface."""
    texts = []
    for doc in docs:
        fields = {
            "question": doc["question"],
            "max_tokens": str(MAX_TOKENS),
            "num_frames": str(NUM_FRAMES),
            "stream": "false",
        }
        files = {"video": Path(doc["video"]).read_bytes()}
        answer = httpx.post(
            f"{url}/v1/video/chat", data=fields, files=files, timeout=PATIENCE_S
        ).raise_for_status()
        texts.append(str(answer.json()["text"]).strip())
    return texts


def test_a_task_gets_the_services_answers(task: Path, docs: list[Doc]) -> None:
    videos = str(Path(docs[0]["video"]).parent)
    with running_service(ROOT, {"DYCOKE_ALLOWED_MEDIA_PATH": videos}) as url:
        arguments = (
            f"model=dycoke-tiny,base_url={url}/v1,api_key=none,pass_video_url=True,"
            f"max_frames_num={NUM_FRAMES},num_concurrent=2,timeout=60,max_retries=1"
        )
        done = run_lmms_eval(task, "openai", arguments)
        assert done.returncode == 0, done.stderr
        assert answers_of(task) == expected_answers(url, docs)
