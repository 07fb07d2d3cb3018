"""Each figure in the prose of docs/benchmarks.md is a committed run's, or is listed here as not.

The phrases under `how` are how something is measured, those under `not_kept` are of runs whose
files are not committed.
"""

import csv
import re
from collections.abc import Iterable
from statistics import median
from typing import Any

from loadtest.auto.figures import ACCURACY_MARGIN
from tests.docs.figures import (
    RESULTS,
    figures_without_data,
    percent,
    rounded,
    run,
    section,
    share,
    signed,
)

DOCUMENT = "docs/benchmarks.md"


def by_name(name: str, key: str = "rows") -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in run(name)[key]}


def assert_told(
    heading: str, measured: Iterable[str], *, how: Iterable[str], not_kept: Iterable[str] = ()
) -> None:
    phrases = [*measured, *how, *not_kept]
    assert figures_without_data(section(DOCUMENT, heading), phrases) == []


def test_the_engine() -> None:
    content = run("engine-cpu-intel.json")
    figures, ratios = content["figures"], by_name("engine-cpu-intel.json", "ratios")
    decode = ratios["decode, full, batch 1: ours / transformers' generate"]
    read_gb_s = rounded(figures["read_gb_s"], 0)
    step_ms = 1000 / decode["limit"] / decode["baseline"]
    share_of_rate = figures["weight_read_gb_s"] / figures["read_gb_s"]
    assert abs(share_of_rate - 0.8) < 0.05
    assert_told(
        "## The engine",
        [
            f"{rounded(figures['matmul_gflops_s'] / 1000, 1)} TFLOP/s and {read_gb_s} GB/s)",
            f"which is {rounded(step_ms, 0)} ms at {read_gb_s} GB/s, and takes "
            f"{rounded(1000 / decode['ours'], 0)}.",
            f"at {rounded(figures['weight_read_gb_s'], 0)} GB/s (the language head",
            f"replaces {percent(figures['refresh_turnover_bundled_weights'])} of the kept set",
        ],
        how=["0.5B with random weights, 32 frames", "reads 1,065 MB", "over 6,300 keys"],
        not_kept=[
            "at 2.3 TFLOP/s: 1.39 and 1.07 for",
            "and 14.7 for the last line",
            "at 1.9 TFLOP/s and 21 GB/s: 1.5 for",
            "1.6 for the third and 11.5 for",
        ],
    )


def test_reading() -> None:
    assert run("reading.json")["turns"] == 3
    lengths = sorted({row["clip_s"] for row in run("reading.json")["rows"]})
    assert lengths == [10, 60, 600]
    assert_told(
        "## Frame reading",
        [
            "10 s, 60 s and 10 min",
            f"{whole('whole', 10)} times decord's CPU time for 10 s, {whole('whole', 60)} for 60 s",
            f"reader took {whole('reader', 10)} and {whole('reader', 60)} in the same turns",
        ],
        how=["reads 32 frames"],
        not_kept=[
            "to 504x280 pixels",
            "some 15 ms of CPU time for a frame of 1920x1080, 50 for one of 3840x2160",
        ],
    )


def whole(contender: str, clip_s: int) -> str:
    """CPU time as a ratio to decord's, on one core and on two."""
    rows = run("reading-whole.json")["rows"]
    found = {
        row["cores"]: row
        for row in rows
        if (row["contender"], row["clip_s"]) == (contender, clip_s)
    }
    return " / ".join(rounded(found[cores]["cpu_ratio"], 2) for cores in (1, 2))


def test_compression_of_frames() -> None:
    found = {(row["clip"], row["codec"]): row for row in run("frame-compression.json")["rows"]}
    size = found["grain", "copy"]["bytes"]
    best = min((r for (clip, _), r in found.items() if clip == "grain"), key=lambda r: r["bytes"])
    assert best["codec"] == "zlib-1 of differences"
    assert abs(1 - best["ratio"] - 1 / 5) < 0.02  # "saves a fifth"
    assert abs(1 - found["grain", "zstd-1 of differences"]["ratio"] - 1 / 7) < 0.02
    both_ms = best["compress_ms"] + best["decompress_ms"]
    assert 150 < both_ms / found["grain", "copy"]["compress_ms"] < 250  # "some two hundred"
    assert_told(
        "## Frames on their way, compressed",
        [f"({rounded(size / 1e6, 1)} MB)"],
        how=["32 frames of 384x384 pixels"],
    )


def test_what_a_token_costs() -> None:
    rows, older, how = by_name("path-64.json"), by_name("path.json"), run("path-64.json")
    step = rows["engine: event loop's CPU per step beside 64 streams, ms"]
    beside_64, beside_1 = (
        rows[f"engine: work of a step beside {streams}, mean ms"]["after"]
        for streams in ("64 streams", "1 stream")
    )
    assert rounded(beside_64, 2) == rounded(beside_1, 2)
    question = older["request, 64 at a time: all, us"]
    assert (run("path.json")["turns"], how["turns"]) == (2, 3)
    assert_told(
        "## What a token costs on its way",
        [
            f"windows of {how['seconds']:g} s",
            "in the mean, beside 64 streams",
            f"a question took {rounded(question['before'] / 1000, 1)} ms before and "
            f"{rounded(question['after'] / 1000, 1)} now",
            f"was {rounded(older['token, 1 streams: all, us']['ratio'], 2)} with one stream and "
            f"{rounded(older['token, 512 streams: all, us']['ratio'], 2)} with 512.",
            f"{rounded(step['after'], 1)} ms a step, {rounded(step['before'], 1)} before",
            f"took {rounded(beside_64, 2)} ms",
        ],
        how=["with 64 streams, three", "turns of 3 s", "Publishing 64 streams"],
    )


def runs(folder: str, *, is_open: bool) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Full tokens and DyCoke, by load."""
    of = [r for r in run(f"{folder}/results.json")["runs"] if bool(r["plan"]["rate"]) is is_open]
    settings = ("full", "dycoke")
    full, dycoke = ([r for r in of if r["plan"]["compression"] == name] for name in settings)
    return list(zip(full, dycoke, strict=True))


def gains(folder: str, what: str) -> str:
    """The least and the most of the closed loop."""
    found = [dycoke[what] / full[what] for full, dycoke in runs(folder, is_open=False)]
    return f"{rounded(min(found), 1)} to {rounded(max(found), 1)} times"


def test_the_service_under_load() -> None:
    medium, bundled = (run(f"{name}/results.json") for name in ("service-medium", "service"))
    full, dycoke = runs("service-medium", is_open=False)[-1]
    assert full["plan"]["users"] == 4
    last_full, last_dycoke = runs("service", is_open=True)[-1]
    assert_told(
        "## The whole service under load",
        [
            f"within {rounded(medium['ttft_objective_s'], 2)} s",
            f"{gains('service-medium', 'tokens_per_s')} the tokens per second",
            f"{rounded(dycoke['ttft_s']['p50'], 2)} s against {rounded(full['ttft_s']['p50'], 2)}",
            f"{gains('service', 'answers_per_s')} as many questions",
            f"at {rounded(last_full['plan']['rate'], 1)} arrivals per second",
            f"{percent(last_dycoke['good_share'])} against {percent(last_full['good_share'])} of",
            f"within {rounded(bundled['ttft_objective_s'], 2)} s",
        ],
        how=["(196 tokens per frame, 6,272 per video)"],
    )


def test_auto() -> None:
    content = run("auto/results.json")
    whole = {f["setting"]: f for f in content["figures"] if f["phase"] == "whole profile"}
    good = {name: percent(figures["good"]["value"]) for name, figures in whole.items()}
    right = {name: share(figures["accuracy"]) for name, figures in whole.items()}
    (accuracy,) = [claim for claim in content["claims"] if claim["measure"] == "accuracy"]
    differs = accuracy["difference"]
    settings = {setting for setting in whole if setting != "auto"}
    beaten = {c["text"].rpartition(" ")[2] for c in content["claims"] if c["verdict"] == "holds"}
    assert settings == beaten and not any(c["verdict"] == "fails" for c in content["claims"])
    with (RESULTS / "auto" / "answers.csv").open() as file:
        burst = [row for row in csv.DictReader(file) if row["phase"] == "burst"]
    of = {name: [row for row in burst if row["setting"] == name] for name in ("auto", "dycoke")}
    hits = {n: [row for row in rows if row["prefix"] == "hit"] for n, rows in of.items()}
    p50 = {n: median(float(row["ttft_s"]) for row in rows) for n, rows in hits.items()}
    shares = [phase["share"] for phase in content["profile"]["phases"]]
    assert {0.5, 1.0, 1.5, 2.5} == set(shares)
    text = section(DOCUMENT, "## Policy auto under a changing load")
    written, _, own = text.partition("<!-- end: loadtest.auto.document -->")
    written, _, _ = written.partition("<!-- begin")
    said = [
        f"than DyCoke ({good['auto']} against {good['dycoke']})",
        f"than full tokens ({good['full']})",
        f"({right['auto']} right against {right['dycoke']})",
        f"is {signed(differs['value'])}, whose exact interval",
        f"on these {re.findall(r'[0-9]+(?= answers)', accuracy['text'])[0]} answers",
        f"[{signed(differs['low'])}, {signed(differs['high'])}]",
        f"the {share(ACCURACY_MARGIN, 2)} that",
        f"found {len(hits['auto'])} of {len(of['auto'])} prefixes",
        f"DyCoke found {len(hits['dycoke'])},",
        f"took {rounded(p50['auto'], 2)} s in the median, {rounded(p50['dycoke'], 2)} s with",
    ]
    assert figures_without_data(own, [*said, *said_of_medium()]) == []
    how = ["1.5 and 2.5 times", "a 429 or 503 count"]
    assert figures_without_data(written, how) == []


def said_of_medium() -> list[str]:
    content = run("auto-medium/results.json")
    figures = {(f["phase"], f["setting"]): f for f in content["figures"]}
    good = {at: percent(f["good"]["value"]) for at, f in figures.items()}
    whole, far = "whole profile", "far overload"
    bursts = {"burst": 10, "rest after burst": 11}
    assert {phase: figures[phase, "auto"]["num_asked"] for phase in bursts} == bursts
    with (RESULTS / "auto-medium" / "answers.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] in bursts]
    late_s = {
        setting: sorted(
            seconds
            for row in rows
            if row["setting"] == setting
            and (seconds := float(row["ttft_s"]) - content["objective_s"]) > 0
        )
        for setting in ("auto", "dycoke")
    }
    assert not late_s["dycoke"] and len(late_s["auto"]) == 2 and late_s["auto"][-1] < 1
    late = [row for row in rows if float(row["ttft_s"]) > content["objective_s"]]
    late = [row for row in late if row["setting"] == "auto"]
    assert {row["compression"] for row in late} == {"full"}
    predicted = [float(row["predicted_ttft_s"]) for row in late]
    later = [float(row["ttft_s"]) - seconds for row, seconds in zip(late, predicted, strict=True)]
    said_s = " and ".join(rounded(seconds, 1) for seconds in predicted)
    came_s = " and ".join(rounded(seconds, 1) for seconds in later)
    return [
        f"just in time (after {said_s} s)",
        f"these came {came_s} s later",
        f"turn of {figures[whole, 'auto']['num_asked']} questions, {good[whole, 'auto']} of the",
        f"`auto`, {good[whole, 'dycoke']} with DyCoke and {good[whole, 'full']} with",
        f"({good[far, 'auto']} against {good[far, 'dycoke']})",
    ]


def test_uploads() -> None:
    content = run("uploads.json")
    rows = by_name("uploads.json")
    cpu = rounded(rows["upload"]["cpu_s_per_gb"], 1)
    assert len(rows["upload"]["turns_mb_s"]) == 5
    assert_told(
        "## Uploads",
        [f"a new video of {content['megabytes']} MB", f"Of the {cpu} s SHA-256"],
        how=(),
        not_kept=["takes about 0.6 (`hashlib` alone hashes 1,800 MB/s here)"],
    )
