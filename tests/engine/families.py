"""The families of models besides LLaVA-OneVision: their checkpoints, what a test asks of them, and
benches over them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dycoke_core.config import BackendName, CompressionConfig
from dycoke_core.model.qwen_vl import QwenVL
from dycoke_core.sequence import ChatMessage, FrameTiming, SamplingParams, Sequence
from tests.engine.bench import Bench, Model
from tests.engine.conftest import installed_plain_kernels, need_triton
from tests.engine.recording import moving_square
from tests.random_gemma import build_random_gemma3
from tests.random_qwen import build_random_qwen2_5_vl, build_random_qwen3_vl

WIDE, TALL = (2, 4), (3, 2)  # of Qwen: tokens per column and row of a unit
SETTINGS: dict[str, Any] = {
    "max_running_sequences": 8,
    "vision_slice_layers": 1,
    "kv_cache_bytes": 2**23,
    "host_cache_bytes": 2**22,
}


def qwen_sequence(
    model: QwenVL,
    name: str = "a",
    *,
    num_frames: int = 7,
    video: int = 1,
    size: tuple[int, int] = TALL,
    seconds: float | None = 5.0,
    **ask: Any,
) -> Sequence:
    """
    Args:
        seconds: between two frames; so long that times reach beyond heights and widths.
    """
    side = model.patches.limits.multiple  # pixels per side of a token
    timing = None
    if seconds is not None:
        times = tuple(seconds * index for index in range(num_frames))
        timing = FrameTiming(times, duration_s=seconds * num_frames)
    frames = moving_square(video, num_frames, 128)[:, : size[0] * side, : size[1] * side]
    return _sequence(name, frames=frames, timing=timing, **ask)


def gemma_sequence(name: str = "a", *, num_frames: int = 7, video: int = 1, **ask: Any) -> Sequence:
    return _sequence(name, frames=moving_square(video, num_frames, 224)[:, 2::4, 2::4], **ask)


def _sequence(
    name: str,
    *,
    question: str = "Describe the video.",
    compression: str | dict[str, object] = "dycoke",
    max_tokens: int = 8,
    forced: tuple[int, ...] = (),
    frames: Any,
    timing: FrameTiming | None = None,
    **sampling: Any,
) -> Sequence:
    return Sequence(
        sequence_id=name,
        messages=(ChatMessage("user", question),),
        frames=frames,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        compression=CompressionConfig.parse(compression),
        forced_token_ids=forced,
        timing=timing,
    )


@dataclass(frozen=True)
class Family:
    """
    Args:
        sequence: makes one for a model.
        large: what a test asks for that wants the largest prompt of its mix.
        other: what makes a prompt of another form.
    """

    build: Callable[[Path], None]
    sequence: Callable[[Any], Callable[..., Sequence]]
    large: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)


def _of_qwen(model: QwenVL) -> Callable[..., Sequence]:
    return partial(qwen_sequence, model)


FAMILIES = {
    "qwen2_5_vl": Family(build_random_qwen2_5_vl, _of_qwen, {"size": WIDE}, {"size": WIDE}),
    "qwen3_vl": Family(build_random_qwen3_vl, _of_qwen, {"size": WIDE}, {"seconds": 1.0}),
    "gemma3": Family(build_random_gemma3, lambda _: gemma_sequence, {}, {"num_frames": 4}),
}


@contextmanager
def bench_of(
    model: Model, backend: BackendName, sequence: Callable[..., Sequence]
) -> Iterator[Bench[Model]]:
    """On "cuda" the kernels are plain operations, which Triton's interpreter would take minutes
    for."""
    if backend == "cuda":
        need_triton()
    with nullcontext([]) if backend == "cpu" else installed_plain_kernels() as violations:
        bench = Bench(model, backend, sequence, SETTINGS)
        yield bench
        bench.check()
        assert not violations
