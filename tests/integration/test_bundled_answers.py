"""The bundled model, from an H.264 file over HTTP to the answer."""

from pathlib import Path

import torch

from dycoke_core.config import EngineConfig
from dycoke_core.engine import Engine
from dycoke_core.tiny import CHECKPOINT
from dycoke_core.tiny.clip import write_video
from dycoke_core.tiny.evaluation import ask
from dycoke_core.tiny.questions import questions_about
from dycoke_core.tiny.render import render
from dycoke_core.tiny.scenes import SIZE, sample_scene
from dycoke_core.video import FrameSpec, read_video_frames
from tests.integration.test_service import receipt_of, running_service


def test_the_service_answers_about_a_file_as_the_engine_does(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    engine = Engine.from_pretrained(CHECKPOINT, EngineConfig(device="cpu"))
    scene = sample_scene(3, split="test", event="order")
    video = tmp_path / "scene.mp4"
    write_video(video, render(scene))
    frames = read_video_frames(video, FrameSpec(num_frames=32, image_size=SIZE)).pixels
    with running_service(tmp_path) as service:
        video_id = service.upload(video)
        for question in questions_about(scene):
            for policy in ("full", "dycoke"):
                asked = service.ask(
                    video_id, question=question.text, compression=policy, max_tokens=64
                )
                receipt = receipt_of(asked)
                assert receipt["finish_reason"] == "stop"
                assert receipt["text"] == ask(engine, frames, question, policy)
