"""The model class that lmms-eval runs tasks with, over the engine that serves requests.

Videos only, one per question, which covers the paper's benchmarks. Questions about a video are kept
together, so that it is read, encoded and prefilled once.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from dycoke_core.config import EngineConfig
from dycoke_core.engine import Engine
from dycoke_core.engine import Sequence as EngineSequence
from dycoke_core.errors import InvalidRequestError
from dycoke_core.lmms_plugin.arguments import compression_of, sampling_of
from dycoke_core.sequence import ChatMessage, FrameTiming
from dycoke_core.video import FrameSpec, VideoFrames, read_video_frames


class Dycoke(lmms):  # type: ignore[misc]
    """Any model that the service takes, with DyCoke.

    Args:
        pretrained: checkpoint directory in Hugging Face format, or hub id.
        dycoke: False for full tokens.
        policy: another policy of the service instead.
        max_frames_num: frames per video, lmms-eval's name for it.
        batch_size: sequences that run at a time.
        settings: `dycoke_k`, `dycoke_l`, `dycoke_p` and other parameters of the policy.

    Raises:
        InvalidRequestError: an argument that the model does not take.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        dycoke: bool = False,
        policy: str | None = None,
        max_frames_num: int = 32,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        settings = {name: value for name, value in settings.items() if value is not None}
        settings.pop("max_batch_size", None)  # of every command line
        self._compression = compression_of(dycoke=dycoke, policy=policy, **settings)
        self._num_frames, self._seed = max_frames_num, seed
        config = EngineConfig(
            device=device or "auto", dtype=dtype, max_running_sequences=max(int(batch_size), 1)
        )
        self._engine = Engine.from_pretrained(pretrained, config)
        card = self._engine.card
        size = card.frame_size(max_frames_num)
        spec = FrameSpec(
            max_frames_num, size, spread=card.frame_spread, resizing=card.frame_resizing
        )
        self._videos = _VideoReader(spec)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers every request, in the order given."""
        texts: dict[str, str] = {}
        order = sorted(range(len(requests)), key=lambda index: self._video_of(requests[index]))
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as bar:
            for name, text in self._run(requests, order):
                texts[name] = text
                bar.update()
        answers = [texts[str(index)] for index in range(len(requests))]
        for request, text in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks that rank continuations are not supported")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported")

    def _run(self, requests: list[Instance], order: Sequence[int]) -> Iterator[tuple[str, str]]:
        """(number of the request, answer) as answers end.

        The engine holds one video's questions beyond those that run, not all videos' frames.
        """
        waiting = list(reversed(order))
        while waiting or self._engine.has_work:
            while waiting and self._engine.stats().num_waiting == 0:
                index = waiting.pop()
                self._engine.add(self._sequence(str(index), requests[index]))
            for event in self._engine.step():
                if event.error is not None:
                    raise event.error
                if event.report is not None:
                    yield event.sequence_id, event.report.text

    def _sequence(self, name: str, request: Instance) -> EngineSequence:
        path = self._video_of(request)
        context, generation = request.args[:2]
        video = self._videos.read(path)
        return EngineSequence(
            sequence_id=name,
            messages=(ChatMessage("user", context),),
            frames=video.pixels,
            timing=FrameTiming.shown_at(video.timestamps_s, video.shown_s),
            sampling=sampling_of(generation, seed=self._seed),
            compression=self._compression,
            video_key=path,
        )

    def _video_of(self, request: Instance) -> str:
        """The path of a request's one video.

        Raises:
            InvalidRequestError: the task shows images, or several videos, or none.
        """
        _, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        if len(visuals) != 1 or not isinstance(visuals[0], str):
            raise InvalidRequestError("only tasks with one video file per question are supported")
        return str(visuals[0])


class DycokeLlavaOnevision(Dycoke):
    """The same under the released code's arguments.

    Args:
        conv_template, model_name: taken as its command lines write them; the checkpoint brings its
            own template.
        arguments: of `Dycoke`.
    """

    def __init__(
        self,
        pretrained: str,
        conv_template: str = "qwen_1_5",
        model_name: str = "llava_qwen",
        **arguments: Any,
    ) -> None:
        if (conv_template, model_name) != ("qwen_1_5", "llava_qwen"):
            raise InvalidRequestError(
                "conv_template must be 'qwen_1_5', and model_name 'llava_qwen'"
            )
        super().__init__(pretrained, **arguments)


class _VideoReader:
    """Reads videos in the sandbox and keeps the last few: their questions come one by one."""

    def __init__(self, spec: FrameSpec, *, max_videos: int = 2) -> None:
        self._spec, self._max_videos = spec, max_videos
        self._videos: OrderedDict[str, VideoFrames] = OrderedDict()

    def read(self, path: str) -> VideoFrames:
        if path not in self._videos:
            self._videos[path] = read_video_frames(Path(path), self._spec)
            if len(self._videos) > self._max_videos:
                self._videos.popitem(last=False)
        return self._videos[path]
