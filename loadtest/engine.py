"""The engine against transformers and against itself, as ratios within one run.

    python -m loadtest.engine [--json] [--with-vision] [--device cuda]

LLaVA-OneVision-0.5B's geometry with random weights, 32 frames of 196 tokens. Prints a table for
people, and with --json one JSON object on the last line. transformers runs the same weights in its
own layout (`loadtest.transformers_baseline`). Videos after the first get copies of its keys and
values, so that each is read from separate memory. Next to each ratio is what it would be if the
engine ran at the machine's rates, measured in the same run (`loadtest.limits`).

Not covered: HTTP, Redis, frame reading.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from dycoke_core.engine import Engine
from dycoke_core.sequence import Stage
from dycoke_core.tiny import CHECKPOINT
from dycoke_core.tiny.architecture import new_model, save_checkpoint
from loadtest import machine
from loadtest.bench import (
    QUESTION,
    Bench,
    cpu_backend,
    decoding_batch,
    end,
    lend_prefix,
    make_engine,
    make_sequence,
    step_seconds,
)
from loadtest.geometry import random_llava_onevision_0_5b
from loadtest.limits import Limits, head_read_bytes_s, measure_limits
from loadtest.llava_onevision import load_llava_onevision
from loadtest.refreshes import count_refreshes
from loadtest.transformers_baseline import ATTENTIONS, TransformersModel

FULL, COMPRESSED = 6272, 2960  # visual tokens in the prefill
NUM_PREFILLS = 3
KEPT = 888  # of the compressed, in a decode step's pruned layers


# --- measurements, each building on the ones before ---


def measure_prefill(bench: Bench, limits: Limits) -> None:
    """Medians of repetitions alternating with transformers'; vision runs once, uncounted."""
    engine = make_engine(bench.model)
    seconds, ideal = {}, {}
    for policy, num_visual in (("full", FULL), ("dycoke", COMPRESSED)):
        baseline = TransformersModel(bench.plain_model, num_visual)
        ours, theirs = [], []
        for _ in range(NUM_PREFILLS):
            ours.append(_prefill(bench, engine, policy))
            theirs.append(baseline.prefill_seconds())
        seconds[policy] = statistics.median(ours)
        ideal[policy] = limits.prefill_seconds(bench.prefixes[policy].num_tokens)
        bench.figures[f"transformers_prefill_{policy}_s"] = statistics.median(theirs)
        bench.figures[f"prefill_{policy}_share_of_limit"] = ideal[policy] / seconds[policy]
        bench.add(
            f"prefill of {num_visual} visual tokens, transformers / ours",
            ours=seconds[policy],
            baseline=statistics.median(theirs),
            ideal=ideal[policy],
            unit="s",
            at_least=1.18,
        )
        if policy == "full":
            for name in ATTENTIONS:
                bench.figures[f"transformers_decode_{name}_s"] = baseline.decode_seconds(name)
    end(engine)
    bench.add(
        "prefill, full / dycoke",
        ours=seconds["dycoke"],
        baseline=seconds["full"],
        ideal=ideal["dycoke"],
        ideal_baseline=ideal["full"],
        unit="s",
        at_least=2.2,
    )


def _prefill(bench: Bench, engine: Engine, policy: str) -> float:
    """Seconds to the first token about a video whose features the engine has."""
    engine.add(make_sequence("prefill", compression=policy))
    while not engine.step():
        pass
    state = engine.states["prefill"]
    bench.prefixes[policy] = cpu_backend(engine).prefix_kv(state.held_prefix.number)
    engine.abort("prefill")
    engine.admission.clear_prefixes()
    return state.clock.prefill_s


def transformers_decode_seconds(bench: Bench) -> float:
    return min(bench.figures[f"transformers_decode_{name}_s"] for name in ATTENTIONS)


def measure_decode(bench: Bench, limits: Limits) -> None:
    seconds, ideal = {}, {}
    for size in (1, 8):
        engine = decoding_batch(bench, size, "full")
        seconds[size] = step_seconds(engine.step)
        ideal[size] = limits.decode_seconds(size, FULL)
        bench.figures[f"decode_full_batch_{size}_share_of_limit"] = ideal[size] / seconds[size]
        end(engine)
    bench.add(
        "decode, full, batch 1: ours / transformers' generate",
        ours=1 / seconds[1],
        baseline=1 / transformers_decode_seconds(bench),
        ideal=1 / ideal[1],
        unit="tokens/s",
        at_least=2.2,
        is_rate=True,
    )
    bench.add(
        "decode, full: batch 8 / batch 1",
        ours=8 / seconds[8],
        baseline=1 / seconds[1],
        ideal=8 / ideal[8],
        ideal_baseline=1 / ideal[1],
        unit="tokens/s",
        at_least=3.0,
        is_rate=True,
    )
    layers = bench.model.text_geometry.num_layers
    ideal_dycoke = limits.decode_seconds(8, (3 * COMPRESSED + (layers - 3) * KEPT) / layers)
    # No cosine is below -1; two steps' scores never reach 1, so each step selects again.
    for name, threshold, at_least in (("no refresh", -1.0, 1.6), ("forced refreshes", 1.0, 1.5)):
        compression = {"policy": "dycoke", "threshold": threshold}
        engine = decoding_batch(bench, 8, compression)
        dycoke = step_seconds(engine.step)
        end(engine)
        bench.figures[f"decode_dycoke_batch_8_{name.replace(' ', '_')}_share_of_limit"] = (
            ideal_dycoke / dycoke
        )
        bench.add(
            f"decode, batch 8: dycoke with {name} / full",
            ours=8 / dycoke,
            baseline=8 / seconds[8],
            ideal=8 / ideal_dycoke,
            ideal_baseline=8 / ideal[8],
            unit="tokens/s",
            at_least=at_least,
            is_rate=True,
        )


def measure_memory(bench: Bench, _: Limits) -> None:
    """What the engine reserves for a sequence of about 60 text and answer tokens.

    On a CPU both memories are the same, so this counts what a device would hold.
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


def measure_second_question(bench: Bench, limits: Limits, *, with_vision: bool) -> None:
    """Time to first token; the second question is asked twice, and the faster one counts."""
    engine = make_engine(bench.model)
    seconds, vision, num_question = [], 0.0, 0
    for number in range(3):
        sequence = make_sequence(str(number), compression="dycoke", question=f"{QUESTION} {number}")
        engine.add(sequence)
        while not (events := engine.step()):
            pass
        state = engine.states[str(number)]
        assert state.clock.first_token_at is not None and events[0].index == 0
        seconds.append(state.clock.first_token_at - state.clock.added_at)
        vision = max(vision, state.clock.vision_s)
        num_question = state.num_question_tokens
        engine.abort(str(number))
    end(engine)
    second = min(seconds[1:])
    ideal = limits.question_seconds(num_question, COMPRESSED)
    bench.figures["vision_s"] = vision
    bench.figures["question_tokens"] = num_question
    bench.figures["second_question_share_of_limit"] = ideal / second
    bench.add(
        "time to first token, first / second question, without vision",
        ours=second,
        baseline=seconds[0] - vision,
        ideal=ideal,
        ideal_baseline=limits.prefill_seconds(COMPRESSED + num_question),
        unit="s",
        at_least=40,
    )
    if with_vision:
        bench.add(
            "time to first token, first / second question, with vision",
            ours=second,
            baseline=seconds[0],
            unit="s",
            at_least=300,
        )


def measure_sixteen_questions(bench: Bench, limits: Limits) -> None:
    """16 questions about 2 videos, answers of 64 tokens; without vision on both sides.

    The limit counts the prefill of 2 prefixes and 63 steps, which read each prefix once in the
    layers that stage II does not prune and every sequence's kept rows in the others.
    """
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
        if engine.states:
            vision = max([vision, *(state.clock.vision_s for state in engine.states.values())])
        engine.step()
    seconds = time.perf_counter() - started_at - vision
    end(engine)
    theirs = bench.figures["transformers_prefill_full_s"] + 63 * transformers_decode_seconds(bench)
    layers = bench.model.text_geometry.num_layers
    rows = (3 * 2 * COMPRESSED + (layers - 3) * 16 * KEPT) / layers
    ideal = 2 * limits.prefill_seconds(COMPRESSED) + 63 * limits.decode_seconds(1, rows)
    bench.add(
        "16 questions about 2 videos: ours with dycoke / transformers, full",
        ours=16 * 64 / seconds,
        baseline=64 / theirs,
        ideal=16 * 64 / ideal,
        unit="tokens/s",
        at_least=15,
        is_rate=True,
    )


# --- command line ---


def measure_refreshes(bench: Bench, _: Limits) -> None:
    """Stage II on the bundled model's shape: with its own weights, and with random ones."""
    with tempfile.TemporaryDirectory() as directory:
        save_checkpoint(new_model(seed=0), Path(directory))
        random_model = load_llava_onevision(directory, device="cpu", dtype="float32")
    bundled = load_llava_onevision(CHECKPOINT, device="cpu", dtype="float32")
    for name, model in (("bundled", bundled), ("random", random_model)):
        counted = count_refreshes(model)
        bench.figures[f"refresh_rate_{name}_weights"] = counted.rate
        bench.figures[f"refresh_turnover_{name}_weights"] = counted.turnover
        bench.figures[f"refresh_steps_{name}_weights"] = counted.steps


def measurements(
    arguments: argparse.Namespace,
) -> Iterator[tuple[str, Callable[[Bench, Limits], None]]]:
    yield "prefill", measure_prefill
    yield "decode", measure_decode
    yield "memory", measure_memory
    yield (
        "second question",
        partial(measure_second_question, with_vision=arguments.with_vision),
    )
    yield "sixteen questions", measure_sixteen_questions
    yield "refreshes", measure_refreshes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.engine", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a JSON object on the last line")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--with-vision", action="store_true", help="the whole vision tower: minutes"
    )
    arguments = parser.parse_args()
    measured_with = machine.describe()  # before this loads the machine
    print("Building LLaVA-OneVision-0.5B's geometry with random weights ...", flush=True)
    make_model = partial(
        random_llava_onevision_0_5b,
        device=arguments.device,
        dtype=torch.bfloat16,
        num_vision_layers=26 if arguments.with_vision else 1,
    )
    bench = Bench(make_model(), make_model(packed=False))
    with torch.inference_mode():
        limits = measure_limits(bench.model)
        bench.figures |= limits.rates()
        plain_rate = head_read_bytes_s(bench.plain_model)
        bench.figures["plain_weight_read_gb_s"] = plain_rate / 1e9
        for name, measure in measurements(arguments):
            print(f"{name}:", flush=True)
            measure(bench, limits)
    for name, value in bench.figures.items():
        print(f"  {name:62} {value:.4g}")
    if arguments.json:
        rows = [asdict(row) for row in bench.rows]
        measured_with |= {"threads": torch.get_num_threads()}
        print(json.dumps({"machine": measured_with, "ratios": rows, "figures": bench.figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
