"""The report as Markdown, laid out like the paper's tables."""

from collections.abc import Callable, Iterator
from typing import Any

from loadtest.accuracy.report import settings_in

Row = dict[str, Any]


def to_markdown(report: dict[str, Any]) -> str:
    sections = [_heading(report)]
    writers: dict[str, Callable[[dict[str, Any]], str]] = {
        "policies": _policies,
        "table1": _table1,
        "table5": _table5,
        "table6": _table6,
        "figure5": _figure5,
    }
    sections += [write(report) for table, write in writers.items() if table in report["tables"]]
    if report["claims"]:
        sections.append(_claims(report))
    return "\n\n".join(sections) + "\n"


def _heading(report: dict[str, Any]) -> str:
    measured_with, model, tests = report["environment"], report["model"], report["test_set"]
    packages = measured_with["packages"]
    fewest = min(tests["questions"].values())
    return "\n".join(
        [
            "# Accuracy under compression",
            "",
            f"{model['architecture']} `{model['weights_digest'][:16]}` "
            f"({model['num_layers']} layers of {model['hidden_size']}, "
            f"{model['tokens_per_unit']} tokens per {_unit(model['frames_per_unit'])}), "
            f"{measured_with['dtype']} on {measured_with['device']} "
            f"({measured_with['machine']['cpu']}, {measured_with['processes']} processes), "
            f"torch {packages['torch']}, transformers {packages['transformers']}, "
            f"Python {measured_with['python']}.",
            "",
            f"{fewest} questions per family about {tests['videos']} synthetic test videos of 32 "
            "frames; every setting answers the same ones. Short answers count where they are the "
            "same words; a description counts by the F1 of the facts that it states. Square "
            "brackets: 95 % interval from resampling videos. *Δ* is the difference from full "
            "tokens on the mean of the short families; *p* is McNemar's exact test over all short "
            "answers, which takes questions about one video for independent.",
            *_left_out(report["left_out"]),
        ]
    )


def _unit(num_frames: int) -> str:
    return "frame" if num_frames == 1 else f"{num_frames} frames"


def _left_out(names: list[str]) -> Iterator[str]:
    if names:
        yield ""
        yield f"Left out, for their code reaches inside LLaVA-OneVision: {', '.join(names)}."


def _policies(report: dict[str, Any]) -> str:
    return f"## Policies and families\n\n{_by_family(report, 'policies')}"


def _table1(report: dict[str, Any]) -> str:
    return f"## Table 1: policies and families\n\n{_by_family(report, 'table1')}"


def _by_family(report: dict[str, Any], table: str) -> str:
    """Policies x families, retained ratio, FLOPs."""
    families = list(report["test_set"]["questions"])
    full = report["settings"]["full"]
    head = ["", "prefill / decode tokens", "retained", "FLOPs (G)", "FLOPs ratio"]
    rows = [
        [
            name,
            f"{row['visual_tokens_prefill']} / {row['visual_tokens_decode']}",
            _retained(row),
            f"{row['paper_flops'] / 1e9:.2f}",
            f"{row['paper_flops'] / full['paper_flops']:.0%}",
            *(_score(row["families"][family]) for family in families),
            *_summary(row),
        ]
        for name, row in settings_in(report, table)
    ]
    cells = _table([*head, *families, *_SUMMARY], rows)
    return (
        f"{cells}\n\nRetained: share of the visual tokens in the prefill / in a decode step's last "
        "layer (the paper's *final*) / in a decode step, mean of all layers. FLOPs by the paper's "
        "Eq. 8, R = 100."
    )


def _table5(report: dict[str, Any]) -> str:
    """Ablations: without DP, random choices, K, L, P."""
    rows = [
        [
            name,
            f"{row['retained_ratio']:.2%}",
            f"{row['refresh_rate']:.0%}",
            *_summary(row),
            _estimate(row["describe"]),
            _difference(row["versus_full"]["describe"]),
        ]
        for name, row in settings_in(report, "table5")
    ]
    head = ["", "retained (final)", "refreshes per step", *_SUMMARY, "describe", "Δ describe"]
    return f"## Table 5: ablations\n\n{_table(head, rows)}"


def _table6(report: dict[str, Any]) -> str:
    """Frames at equal budget."""
    rows = [
        [
            name,
            str(row["num_frames"]),
            f"{row['paper_flops'] / 1e9:.2f}",
            _estimate(row["short"]),
            _score(row["families"]["brief_event"]),
            _estimate(row["describe"]),
        ]
        for name, row in sorted(
            settings_in(report, "table6"), key=lambda item: item[1]["paper_flops"]
        )
    ]
    head = ["", "frames", "FLOPs (G)", "short answers", "brief_event", "describe"]
    return f"## Table 6: more frames at the same cost\n\n{_table(head, rows)}"


def _figure5(report: dict[str, Any]) -> str:
    """Accuracy over K at several numbers of frames."""
    rows = [
        [
            str(row["num_frames"]),
            _share_dropped(row),
            _estimate(row["short"]),
            _estimate(row["describe"]),
        ]
        for _, row in settings_in(report, "figure5")
    ]
    table = _table(["frames", "K", "short answers", "describe"], rows)
    return f"## Figure 5: accuracy over K\n\n![Accuracy over K](figure5.png)\n\n{table}"


def _claims(report: dict[str, Any]) -> str:
    rows = [
        [claim["text"], _difference(claim["difference"]), claim["verdict"]]
        for claim in report["claims"]
    ]
    note = (
        "*holds*: the whole interval is above 0, or above -.02 where that is claimed; *fails*: it "
        "is below; *in the mean*: the difference is above -.02, not all of its interval; "
        "*not shown*: the interval has both. Each interval is 95 % by itself: of twenty, one may "
        "miss by chance."
    )
    return f"## What this shows\n\n{_table(['', 'difference', ''], rows)}\n\n{note}"


_SUMMARY = ("short answers", "Δ", "p")


def _summary(row: Row) -> Iterator[str]:
    versus = row["versus_full"]
    yield _estimate(row["short"])
    yield _difference(versus["short"])
    yield f"{versus['mcnemar']['p']:.2g}"


def _retained(row: Row) -> str:
    prefill = row["visual_tokens_prefill"] / row["visual_tokens_in"]
    shares = (prefill, row["retained_ratio"], row["retained_ratio_decode_all_layers"])
    return " / ".join(f"{share:.1%}" for share in shares)


def _share_dropped(row: Row) -> str:
    compression = row["compression"]
    return "full tokens" if compression["policy"] == "full" else f"{compression['k']:g}"


def _score(value: float) -> str:
    return f"{value:.3f}".lstrip("0") if value < 1 else "1.00"


def _estimate(estimate: dict[str, float]) -> str:
    return f"{_score(estimate['value'])} [{_score(estimate['low'])}, {_score(estimate['high'])}]"


def _difference(estimate: dict[str, float]) -> str:
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    rounded = (round(estimate[part], 3) + 0.0 for part in ("value", "low", "high"))
    value, low, high = (f"{part:+.3f}" for part in rounded)
    return f"{value} [{low}, {high}]"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
