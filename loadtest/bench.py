"""Shared by the engine's measurements: models, engines with lent prefixes, rows of results."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dycoke_core.config import CompressionConfig, EngineConfig
from dycoke_core.engine import Engine, SamplingParams, Sequence
from dycoke_core.engine.backends.cpu.backend import CpuBackend
from dycoke_core.engine.backends.cpu.kv_cache import PrefixKV
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import ChatMessage, Stage

NUM_FRAMES = 32
NUM_STEPS = 12  # timed decode steps, after NUM_WARM_STEPS
NUM_WARM_STEPS = 3
QUESTION = "Which shape appears first, and what color does it have at the end of the video?"


@dataclass(frozen=True)
class Row:
    """One ratio. `ours` and `baseline` are what `unit` says.

    at_least: the bound wanted. limit: the ratio if our side ran at the machine's rates as measured
    in this run (`loadtest.limits`); None if not counted.
    """

    name: str
    ratio: float
    at_least: float | None
    limit: float | None
    ours: float
    baseline: float
    unit: str


@dataclass
class Bench:
    """The model with its weights as the engine keeps them, and as transformers has them."""

    model: LlavaOnevision
    plain_model: LlavaOnevision
    rows: list[Row] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    prefixes: dict[str, PrefixKV] = field(default_factory=dict)  # by policy, prefilled once

    def add(
        self,
        name: str,
        *,
        ours: float,
        baseline: float,
        unit: str,
        at_least: float | None = None,
        ideal: float | None = None,
        ideal_baseline: float | None = None,
        is_rate: bool = False,
    ) -> None:
        """Ratios above 1 are in our favour: of rates ours / baseline, of costs the other way.

        Args:
            ideal: `ours` at the machine's rates; `ideal_baseline` too, if the baseline is ours.
        """

        def ratio(mine: float, other: float) -> float:
            return mine / other if is_rate else other / mine

        limit = None if ideal is None else ratio(ideal, ideal_baseline or baseline)
        row = Row(name, ratio(ours, baseline), at_least, limit, ours, baseline, unit)
        self.rows.append(row)
        bound = "" if at_least is None else f"  wanted {at_least}"
        bound += "" if limit is None else f", limit here {limit:.3g}"
        print(
            f"  {name:62} {row.ratio:7.2f}{bound}   {ours:.4g} against {baseline:.4g} {unit}",
            flush=True,
        )


def make_engine(model: LlavaOnevision, **settings: Any) -> Engine:
    return Engine(
        model, EngineConfig(device=str(model.device), kv_cache_bytes=8 * 2**30, **settings)
    )


def make_sequence(
    name: str,
    *,
    video: int = 0,
    compression: str | dict[str, Any] = "full",
    max_tokens: int = 64,
    question: str = QUESTION,
) -> Sequence:
    frames = np.random.default_rng(video).integers(0, 256, (NUM_FRAMES, 384, 384, 3), np.uint8)
    return Sequence(
        sequence_id=name,
        messages=(ChatMessage("user", question),),
        frames=frames,
        sampling=SamplingParams(max_tokens=max_tokens),
        compression=CompressionConfig.parse(compression),
        video_key=f"video {video}",
    )


def lend_prefix(bench: Bench, engine: Engine, sequence: Sequence) -> None:
    """Gives a sequence's video a copy of a prefix that was prefilled under its policy."""
    source = bench.prefixes[sequence.compression.policy]
    number = cpu_backend(engine).lend_prefix(source)
    engine.admission.adopt_prefix(sequence, number)


def cpu_backend(engine: Engine) -> CpuBackend:
    assert isinstance(engine.backend, CpuBackend), "this benchmark measures the CPU's backend"
    return engine.backend


def decoding_batch(
    bench: Bench, size: int, compression: str | dict[str, Any], **settings: Any
) -> Engine:
    """An engine whose sequences, each about its own video, all decode."""
    engine = make_engine(bench.model, max_running_sequences=size, **settings)
    for video in range(size):
        sequence = make_sequence(str(video), video=video, compression=compression)
        lend_prefix(bench, engine, sequence)
        engine.add(sequence)
    while any(state.sequence.stage is not Stage.DECODING for state in engine.states.values()):
        engine.step()
    return engine


def step_seconds(step: Callable[[], object]) -> float:
    """Median over repetitions, after some uncounted ones."""
    for _ in range(NUM_WARM_STEPS):
        step()
    seconds = []
    for _ in range(NUM_STEPS):
        started_at = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds)


def end(engine: Engine) -> None:
    for sequence_id in list(engine.states):
        engine.abort(sequence_id)
    engine.clear_caches()
