"""Asks a question about a video without server or Redis: streams the answer, then prints its costs.

python -m dycoke_core VIDEO QUESTION [--model DIR] [--compression NAME]
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging as transformers_logging

from dycoke_core.config import MAX_FRAME_PIXELS, CompressionConfig, EngineConfig
from dycoke_core.engine import Engine, SamplingParams, Sequence
from dycoke_core.errors import DycokeError, InvalidRequestError
from dycoke_core.sequence import ChatMessage, FrameTiming, SequenceReport
from dycoke_core.tiny import CHECKPOINT
from dycoke_core.video import SAMPLINGS, FrameSpec, VideoFrames, read_video_frames


def main() -> int:
    arguments = _parse_arguments()
    transformers_logging.disable_progress_bar()
    try:
        _answer(arguments)
    except DycokeError as error:
        print(f"error: {error.code}: {error.message}", file=sys.stderr)
        return 1
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dycoke_core", description=__doc__)
    parser.add_argument("video", type=Path, metavar="VIDEO")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--model", default=str(CHECKPOINT), help="directory or hub id")
    parser.add_argument("--compression", default="dycoke", help="a policy's name, or a JSON object")
    parser.add_argument("--num-frames", type=int, default=32)
    parser.add_argument("--sampling", default="uniform", choices=SAMPLINGS)
    parser.add_argument(
        "--max-pixels", type=int, help="of each frame, for models that take any size"
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    return parser.parse_args()


def _answer(arguments: argparse.Namespace) -> None:
    compression = CompressionConfig.from_text(arguments.compression)
    sampling = SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    if not arguments.video.is_file():
        raise InvalidRequestError(f"there is no file {arguments.video}")
    config = EngineConfig(
        device=arguments.device,
        dtype=arguments.dtype,
        max_frame_pixels=max(arguments.max_pixels or 1, MAX_FRAME_PIXELS),
    )
    engine = Engine.from_pretrained(arguments.model, config)
    spec = FrameSpec(
        num_frames=arguments.num_frames,
        image_size=engine.card.frame_size(arguments.num_frames, arguments.max_pixels),
        sampling=arguments.sampling,
        spread=engine.card.frame_spread,
        resizing=engine.card.frame_resizing,
    )
    frames = read_video_frames(arguments.video, spec)
    messages = (ChatMessage("user", arguments.question),)
    timing = FrameTiming.shown_at(frames.timestamps_s, frames.shown_s)
    sequence = Sequence("cli", messages, frames.pixels, sampling, compression, timing=timing)
    engine.add(sequence)
    for text, report in _stream(engine):
        print(text, end="", flush=True)
        if report is not None:
            print(flush=True)
            _print_receipt(frames, report)


def _stream(engine: Engine) -> Iterator[tuple[str, SequenceReport | None]]:
    """Text as it becomes printable, the report with the last piece."""
    while engine.has_work:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            yield event.text, event.report


def _print_receipt(frames: VideoFrames, report: SequenceReport) -> None:
    c, t, m = report.compression, report.timings, report.memory
    lines = [
        f"frames   {len(frames.indices)} read with {frames.reader}"
        + "".join(f"; {warning}" for warning in frames.warnings),
        f"visual   {c.visual_tokens_in} tokens, {c.visual_tokens_prefill} after stage I, "
        f"{c.visual_tokens_decode} in pruned layers of a decode step ({c.refreshes} refreshes)",
        f"time     vision {t.vision_s:.3f} s, prefill {t.prefill_s:.3f} s, "
        f"decode {t.decode_s:.3f} s for {report.completion_tokens} tokens",
        f"memory   {m.kv_bytes / 1e6:.2f} MB of keys and values in use, "
        f"{m.dp_cache_bytes / 1e6:.2f} MB in the DP cache; full tokens would hold "
        f"{m.kv_bytes_full_tokens / 1e6:.2f} MB",
        f"compute  {c.exact_flops_actual / 1e9:.2f} GFLOP of {c.exact_flops_full / 1e9:.2f} "
        "with full tokens",
    ]
    print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
