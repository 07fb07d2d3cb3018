"""The engine against transformers and against itself, as ratios within one run.

    python -m loadtest.engine [--json] [--with-vision] [--device cuda]

LLaVA-OneVision-0.5B's geometry with random weights, 32 frames of 196 tokens. Prints a table for
people, and with --json one JSON object on the last line. transformers is measured through the same
weights: prefill by one forward call, decode by its cache and forward calls in a loop, which leaves
out `generate`'s own overhead. Videos beyond the first get copies of its keys and values, so that
each is read from memory of its own.

What is not covered: HTTP, Redis, frame reading.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from dycoke_core.compression import flops
from dycoke_core.compression.kv_pruning import KVPruner
from dycoke_core.config import CompressionConfig, EngineConfig
from dycoke_core.engine import Engine, SamplingParams, Sequence
from dycoke_core.engine.kv_cache import PrefixKV, Slab
from dycoke_core.engine.prefix_cache import Prefix
from dycoke_core.model.attention import ATTENTION_NAME
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import ChatMessage, Stage
from loadtest.geometry import random_llava_onevision_0_5b

NUM_FRAMES = 32
NUM_STEPS = 12  # timed decode steps, after NUM_WARM_STEPS
NUM_WARM_STEPS = 3
QUESTION = "Which shape appears first, and what color does it have at the end of the video?"


@dataclass(frozen=True)
class Row:
    """One ratio. `ours` and `baseline` are what `unit` says; `expected` is the issue's bound."""

    name: str
    ratio: float
    at_least: float | None
    ours: float
    baseline: float
    unit: str


@dataclass
class Bench:
    """What the measurements share: the model, and figures that several ratios use."""

    model: LlavaOnevision
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
        is_rate: bool = False,
    ) -> None:
        """Ratios above 1 are in our favour: of rates ours / baseline, of costs the other way."""
        ratio = ours / baseline if is_rate else baseline / ours
        self.rows.append(Row(name, ratio, at_least, ours, baseline, unit))
        bound = "" if at_least is None else f"  (wanted: {at_least})"
        print(
            f"  {name:58} {ratio:7.2f}{bound}   {ours:.4g} against {baseline:.4g} {unit}",
            flush=True,
        )


# --- engines and sequences ---


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
    """Gives a sequence's video a copy of the prefix that its policy prefilled before."""
    source = bench.prefixes[sequence.compression.policy]
    admission = engine._admission
    state = admission.prepare(sequence)
    slabs = [Slab(slab.keys.clone(), slab.values.clone(), slab.length) for slab in source.slabs]
    kv = PrefixKV(
        slabs,
        source.num_capacity_tokens,
        source.first_visual,
        source.num_visual,
        source.num_tokens,
    )
    num_bytes = sum(slab.keys.nbytes + slab.values.nbytes for slab in slabs)
    prefix = Prefix(state.prefix_key, None, num_bytes, kv=kv, kept_per_frame=(0,) * NUM_FRAMES)
    admission._prefixes.add(prefix)
    if engine._config.dp_cache == "host":
        first_layer = admission._first_host_layer(state)
        kv.move_to_host(first_layer)
        host_share = 1 - first_layer / bench.model.text_geometry.num_layers
        admission._prefixes.move_to_host(prefix, round(num_bytes * host_share))
    admission._prefixes.release(prefix)


def decoding_batch(
    bench: Bench, size: int, compression: str | dict[str, Any], **settings: Any
) -> Engine:
    """An engine whose sequences, each about a video of its own, all decode."""
    engine = make_engine(bench.model, max_running_sequences=size, **settings)
    for video in range(size):
        sequence = make_sequence(str(video), video=video, compression=compression)
        lend_prefix(bench, engine, sequence)
        engine.add(sequence)
    while any(state.sequence.stage is not Stage.DECODING for state in engine._states.values()):
        engine.step()
    return engine


def step_seconds(step: Callable[[], object]) -> float:
    """Median of a decode step."""
    for _ in range(NUM_WARM_STEPS):
        step()
    seconds = []
    for _ in range(NUM_STEPS):
        started_at = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds)


def end(engine: Engine) -> None:
    for sequence_id in list(engine._states):
        engine.abort(sequence_id)
    engine.clear_caches()


# --- transformers on the same weights ---


class TransformersModel:
    """Prefill and decode by transformers' own attention and cache."""

    def __init__(self, model: LlavaOnevision, num_visual_tokens: int) -> None:
        self._model = model.model
        prompt = model.prompt_encoder((ChatMessage("user", QUESTION),))
        shape = (num_visual_tokens, model.text_geometry.hidden_size)
        visual = torch.randn(shape, dtype=model.dtype, device=model.device)
        prefix = model.embed_prefix(prompt.ids_before_video, 0.02 * visual)
        self._embeds = torch.cat([prefix, model.embed_tokens(prompt.ids_after_video)])[None]
        self._cache = DynamicCache(config=self._model.config.text_config)

    def prefill(self, attention: str = "sdpa") -> None:
        self._forward(attention, inputs_embeds=self._embeds)

    def decode_one(self, attention: str) -> None:
        token = torch.tensor([[7]], device=self._embeds.device)
        self._forward(attention, input_ids=token)

    def _forward(self, attention: str, **inputs: Tensor) -> None:
        config = self._model.model.language_model.config
        config._attn_implementation = attention
        try:
            output = self._model.model.language_model(
                **inputs, past_key_values=self._cache, use_cache=True
            )
            int(self._model.lm_head(output.last_hidden_state[:, -1]).argmax())
        finally:
            config._attn_implementation = ATTENTION_NAME


# --- measurements, in the order in which they build on one another ---


def measure_machine(bench: Bench) -> None:
    """The limits that the others are held against, in this run."""
    make = partial(torch.randn, dtype=torch.float32, device=bench.model.device)
    left, right = make(2960, 896).to(bench.model.dtype), make(896, 4864).to(bench.model.dtype)
    weights, row = make(151_936, 896).to(bench.model.dtype), make(1, 896).to(bench.model.dtype)
    source = make(64 * 2**20)
    target = torch.empty_like(source)
    seconds = step_seconds(lambda: _wait_for(left @ right))
    bench.figures["matmul_gflops"] = 2 * 2960 * 896 * 4864 / seconds / 1e9
    seconds = step_seconds(lambda: _wait_for(row @ weights.T))
    bench.figures["weight_read_gb_s"] = weights.nbytes / seconds / 1e9
    seconds = step_seconds(lambda: _wait_for(target.copy_(source)))
    bench.figures["copy_gb_s"] = 2 * source.nbytes / seconds / 1e9


def _wait_for(result: Tensor) -> None:
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)


def measure_prefill(bench: Bench) -> None:
    seconds = {}
    for policy in ("full", "dycoke"):
        engine = make_engine(bench.model)
        engine.add(make_sequence("first", compression=policy))
        while not engine.step():
            pass
        state = engine._states["first"]
        assert state.prefix is not None and state.prefix.kv is not None
        bench.prefixes[policy] = state.prefix.kv
        seconds[policy] = state.clock.prefill_s
        num_flops = prefill_flops(bench, policy)
        bench.figures[f"prefill_{policy}_gflops"] = num_flops / seconds[policy] / 1e9
        end(engine)
    bench.add(
        "prefill, full / dycoke",
        ours=seconds["dycoke"],
        baseline=seconds["full"],
        unit="s",
        at_least=2.2,
    )
    for policy, num_visual in (("full", 6272), ("dycoke", 2960)):
        theirs = TransformersModel(bench.model, num_visual)
        started_at = time.perf_counter()
        theirs.prefill()
        baseline = time.perf_counter() - started_at
        bench.figures[f"transformers_prefill_{policy}_s"] = baseline
        bench.add(
            f"prefill of {num_visual} visual tokens, transformers / ours",
            ours=seconds[policy],
            baseline=baseline,
            unit="s",
            at_least=round(1 / 0.85, 2),
        )
        if policy == "full":
            for name in ("sdpa", "eager"):
                seconds_per_step = step_seconds(partial(theirs.decode_one, name))
                bench.figures[f"transformers_decode_{name}_s"] = seconds_per_step


def prefill_flops(bench: Bench, policy: str) -> float:
    return flops.prefill_flops(bench.model.text_geometry, bench.prefixes[policy].num_tokens)


def measure_decode(bench: Bench) -> None:
    seconds = {}
    for size in (1, 8):
        engine = decoding_batch(bench, size, "full")
        seconds[size] = step_seconds(engine.step)
        bench.figures[f"decode_full_batch_{size}_s"] = seconds[size]
        end(engine)
    theirs = min(bench.figures[f"transformers_decode_{name}_s"] for name in ("sdpa", "eager"))
    bench.add(
        "decode, full, batch 1: ours / transformers",
        ours=1 / seconds[1],
        baseline=1 / theirs,
        unit="tokens/s",
        at_least=2.2,
        is_rate=True,
    )
    bench.add(
        "decode, full: batch 8 / batch 1",
        ours=8 / seconds[8],
        baseline=1 / seconds[1],
        unit="tokens/s",
        at_least=3.0,
        is_rate=True,
    )
    for name, threshold, at_least in (("no refresh", -1.0, 1.6), ("forced refreshes", 0.9, 1.5)):
        compression = {"policy": "dycoke", "threshold": threshold}
        engine = decoding_batch(bench, 8, compression)
        if name == "forced refreshes":
            force_turnover(engine)
        dycoke = step_seconds(engine.step)
        bench.figures[f"decode_dycoke_batch_8_{name.replace(' ', '_')}_s"] = dycoke
        bench.add(
            f"decode, batch 8: dycoke with {name} / full",
            ours=8 / dycoke,
            baseline=8 / seconds[8],
            unit="tokens/s",
            at_least=at_least,
            is_rate=True,
        )
        end(engine)


class TurnoverPruner(KVPruner):
    """Selects at every step and exchanges half of the kept set, whatever the scores say."""

    step = 0

    def update(self, scores: Tensor) -> Tensor:
        super().update(scores)
        shift = (self.num_kept // 2) * self.step
        places = (torch.arange(self.num_kept) + shift) % self.num_visual_tokens
        self.kept, self.step = places.sort().values.to(scores.device), self.step + 1
        return torch.ones((), dtype=torch.bool, device=scores.device)


def force_turnover(engine: Engine) -> None:
    for state in engine._states.values():
        assert state.kv is not None and state.kv.pruner is not None
        pruner = state.kv.pruner
        state.kv.pruner = TurnoverPruner(
            pruner.num_visual_tokens, pruner.num_kept, pruner.threshold
        )


def measure_memory(bench: Bench) -> None:
    """What the engine reserves for a sequence of about 60 text and answer tokens.

    On a CPU the two memories are one, so this counts what a device would hold.
    """
    held = {}
    for policy, settings in (("full", {}), ("dycoke", {"dp_cache": "host"})):
        engine = make_engine(bench.model, **settings)
        sequence = make_sequence("a", compression=policy, max_tokens=30)
        lend_prefix(bench, engine, sequence)
        engine.add(sequence)
        while sequence.stage is not Stage.DECODING:
            engine.step()
        held[policy] = engine.stats().kv_bytes_in_use
        end(engine)
    bench.add(
        "device KV bytes reserved, full / dycoke with DP cache on host",
        ours=held["dycoke"],
        baseline=held["full"],
        unit="bytes",
        at_least=5.0,
    )


def measure_second_question(bench: Bench, *, with_vision: bool) -> None:
    engine = make_engine(bench.model)
    seconds, vision = [], 0.0
    for number in range(2):
        sequence = make_sequence(str(number), compression="dycoke", question=f"{QUESTION} {number}")
        engine.add(sequence)
        while not (events := engine.step()):
            pass
        state = engine._states[str(number)]
        assert state.clock.first_token_at is not None and events[0].index == 0
        seconds.append(state.clock.first_token_at - state.clock.added_at)
        vision += state.clock.vision_s
        engine.abort(str(number))
    bench.figures["vision_s"] = vision
    bench.add(
        "time to first token, first / second question, without vision",
        ours=seconds[1],
        baseline=seconds[0] - vision,
        unit="s",
        at_least=40,
    )
    if with_vision:
        bench.add(
            "time to first token, first / second question, with vision",
            ours=seconds[1],
            baseline=seconds[0],
            unit="s",
            at_least=300,
        )
    end(engine)


def measure_sixteen_questions(bench: Bench) -> None:
    """16 questions about 2 videos, answers of 64 tokens; vision left out on both sides."""
    engine = make_engine(bench.model, max_running_sequences=16)
    for number in range(16):
        engine.add(
            make_sequence(
                str(number),
                video=number % 2,
                compression="dycoke",
                question=f"{QUESTION} {number}",
            )
        )
    vision = 0.0
    started_at = time.perf_counter()
    while engine.has_work:
        if engine._states:
            vision = max([vision, *(state.clock.vision_s for state in engine._states.values())])
        engine.step()
    seconds = time.perf_counter() - started_at - vision
    theirs = bench.figures["transformers_prefill_full_s"] + 63 * min(
        bench.figures[f"transformers_decode_{name}_s"] for name in ("sdpa", "eager")
    )
    bench.add(
        "16 questions about 2 videos: ours with dycoke / transformers, full",
        ours=16 * 64 / seconds,
        baseline=64 / theirs,
        unit="tokens/s",
        at_least=15,
        is_rate=True,
    )
    end(engine)


def measure_limits(bench: Bench) -> None:
    """How near decode comes to reading its bytes at the machine's speed."""
    text = bench.model.text_geometry
    weights = sum(p.nbytes for p in bench.model.model.model.language_model.parameters())
    rows = {"full": 6272 * text.num_layers}
    rows["dycoke"] = 2960 * 3 + 888 * (text.num_layers - 3)
    row_bytes = 2 * text.num_kv_heads * text.head_size * bench.model.dtype.itemsize
    read, copy = bench.figures["weight_read_gb_s"], bench.figures["copy_gb_s"]
    for name, policy, size in (
        ("decode_full_batch_1", "full", 1),
        ("decode_full_batch_8", "full", 8),
        ("decode_dycoke_batch_8_no_refresh", "dycoke", 8),
    ):
        ideal = weights / read / 1e9 + size * rows[policy] * row_bytes / copy / 1e9
        bench.figures[f"{name}_share_of_limit"] = ideal / bench.figures[f"{name}_s"]
    for policy in ("full", "dycoke"):
        rate = bench.figures[f"prefill_{policy}_gflops"]
        bench.figures[f"prefill_{policy}_share_of_limit"] = rate / bench.figures["matmul_gflops"]


# --- command line ---


def environment() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measurements(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[Bench], None]]]:
    yield "machine", measure_machine
    yield "prefill", measure_prefill
    yield "decode", measure_decode
    yield "memory", measure_memory
    yield (
        "second question",
        lambda bench: measure_second_question(bench, with_vision=arguments.with_vision),
    )
    yield "sixteen questions", measure_sixteen_questions
    yield "limits", measure_limits


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.engine", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a JSON object on the last line")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--with-vision", action="store_true", help="the whole vision tower: minutes"
    )
    arguments = parser.parse_args()
    num_vision_layers = 26 if arguments.with_vision else 1
    print("Building LLaVA-OneVision-0.5B's geometry with random weights ...", flush=True)
    model = random_llava_onevision_0_5b(
        device=arguments.device, dtype=torch.bfloat16, num_vision_layers=num_vision_layers
    )
    bench = Bench(model)
    with torch.inference_mode():
        for name, measure in measurements(arguments):
            print(f"{name}:", flush=True)
            measure(bench)
    for name, value in bench.figures.items():
        print(f"  {name:58} {value:.4g}")
    if arguments.json:
        rows = [asdict(row) for row in bench.rows]
        print(json.dumps({"environment": environment(), "ratios": rows, "figures": bench.figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
