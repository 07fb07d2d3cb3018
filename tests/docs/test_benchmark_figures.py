"""The figures of docs/benchmarks.md are those of the committed runs."""

from collections.abc import Iterable, Iterator
from typing import Any

from tests.docs.figures import percent, rounded, run
from tests.docs.tables import plain, table, words

DOCUMENT = "docs/benchmarks.md"
Row = dict[str, Any]


def by_name(name: str, key: str = "rows") -> dict[str, Row]:
    return {row["name"]: row for row in run(name)[key]}


INTEL = by_name("engine-cpu-intel.json", "ratios")
AMD = by_name("engine-cpu-amd.json", "ratios")
# Rows of the table, by what the names of their ratios begin with; some hold two.
ENGINE = (
    ("decode, full, batch 1: ours / transformers",),
    ("decode, full: batch 8 / batch 1",),
    ("decode, batch 8: dycoke with no refresh", "decode, batch 8: dycoke with forced refreshes"),
    ("prefill, full / dycoke",),
    ("prefill of 6272 visual tokens", "prefill of 2960 visual tokens"),
    ("device KV bytes reserved",),
    (
        "time to first token, first / second question, without vision",
        "time to first token, first / second question, with vision",
    ),
    ("16 questions about 2 videos",),
)


def ratios(rows: dict[str, Row], starts: Iterable[str]) -> list[float | None]:
    found = [[row["ratio"] for name, row in rows.items() if name.startswith(s)] for s in starts]
    return [ratio[0] if ratio else None for ratio in found]


def limits(starts: Iterable[str]) -> list[float]:
    """Once where both share a limit; none where nothing limits."""
    rows = (row for start in starts for name, row in INTEL.items() if name.startswith(start))
    return list(dict.fromkeys(row["limit"] for row in rows if row["limit"] is not None))


def assert_rounds_to(cell: str, values: list[Any]) -> None:
    """The numbers of a cell are the values, to as many digits as each of them has."""
    said = [text for text in cell.split("; ") if text]
    assert len(said) == len(values), f"{cell}: {values}"
    for text, value in zip(said, values, strict=True):
        digits = len(text.partition(".")[2])
        assert text == ("\N{EN DASH}" if value is None else rounded(value, digits)), cell


def test_the_engine() -> None:
    rows = table(DOCUMENT, "ratio", "Intel Xeon with AMX", "limit there", "AMD EPYC").rows
    for starts, (_, intel, limit, amd) in zip(ENGINE, rows, strict=True):
        assert_rounds_to(intel, ratios(INTEL, starts))
        assert_rounds_to(limit, limits(starts))
        assert_rounds_to(amd, ratios(AMD, starts))


def test_what_the_readme_says_that_compression_saves() -> None:
    prefill, decode = (
        rounded(float(ratios(INTEL, (start,))[0] or 0), digits)
        for start, digits in (("prefill, full / dycoke", 1), (ENGINE[2][0], 2))
    )
    said = f"prefill is {prefill} times as fast and decoding at batch 8 is {decode} times as fast"
    assert said in words("README.md")


def test_reading() -> None:
    cells = {
        (row["contender"], row["clip_s"], row["cores"]): row["cpu_ratio"]
        for row in run("reading.json")["rows"]
    }
    rows = table(DOCUMENT, "", "10 s", "60 s", "10 min").rows
    for contender, (_, *said) in zip(("reader", "pyav", "keyframe"), rows, strict=True):
        for clip_s, cell in zip((10, 60, 600), said, strict=True):
            assert_rounds_to(
                cell.replace(" / ", "; "), [cells[contender, clip_s, cores] for cores in (1, 2)]
            )


def codec(row: str) -> str:
    """As the JSON names it."""
    name = row.replace(", level ", "-").replace(", of differences", " of differences")
    return {"one copy in memory": "copy"}.get(name, name)


def test_compression_of_frames() -> None:
    found = {(row["clip"], row["codec"]): row for row in run("frame-compression.json")["rows"]}
    for name, *cells in table(DOCUMENT, "", "bundled: bytes left").rows:
        for clip, (left, times) in zip(("bundled", "grain"), (cells[:2], cells[2:]), strict=True):
            row = found[clip, codec(name)]
            assert left == percent(row["bytes"] / found[clip, "copy"]["bytes"]), name
            measured = [row["compress_ms"], row["decompress_ms"]]
            assert_rounds_to(times.replace(", ", "; "), measured[: times.count(",") + 1])


PATH = by_name("path-64.json")


def path_rows() -> Iterator[tuple[Row, float, tuple[str, ...]]]:
    """Each of the table's rows with that of the run, and how many of the run's units one of its
    is."""
    names = iter(
        (
            *(f"token, 64 streams: {part}, us" for part in ("all", "worker", "redis", "api")),
            *(f"request, 64 at a time: {part}, us" for part in ("all", "worker", "redis", "api")),
            "limit: events per CPU second of the api, 64 streams",
            "limit: tokens/s in a flood",
            "engine: work of a step beside 64 streams, median ms",
            "engine: work of a step beside 1 stream, median ms",
            "engine: event loop's CPU per step beside 64 streams, ms",
        )
    )
    for cells in table(DOCUMENT, "", "before", "now", "now / before").rows:
        name = next(names)
        yield PATH[name], 1000 if name.startswith("request") else 1, cells
    assert not list(names)


def test_what_a_token_costs() -> None:
    for row, unit, (_, before, now, ratio) in path_rows():
        assert_rounds_to(before, [row["before"] / unit])
        assert_rounds_to(now, [row["after"] / unit])
        ratio, _, spread = ratio.partition(" (")
        assert_rounds_to(ratio, [row["ratio"]])
        if spread:
            ends = [min(row["ratios"]), max(row["ratios"])]
            assert_rounds_to(spread.rstrip(")").replace(" to ", "; "), ends)


def test_uploads() -> None:
    found = by_name("uploads.json")
    names = {"upload, at commit 6e49da4": "upload, before"}
    for name, rate, cpu in table(DOCUMENT, "", "MB/s").rows:
        row = found[names.get(name, plain(name))]
        assert_rounds_to(rate, [row["mb_s"]])
        assert_rounds_to(cpu, [] if row["cpu_s_per_gb"] is None else [row["cpu_s_per_gb"]])


def open_loop(folder: str) -> dict[float, dict[str, Row]]:
    """The runs at each rate of arrivals, by their setting."""
    found: dict[float, dict[str, Row]] = {}
    for one in run(f"{folder}/results.json")["runs"]:
        if one["plan"]["rate"]:
            found.setdefault(one["plan"]["rate"], {})[one["plan"]["compression"]] = one
    return found


def test_the_service_under_load() -> None:
    rows = table(DOCUMENT, "arrivals/s").rows
    for (rate, both), said in zip(open_loop("service-medium").items(), rows, strict=True):
        assert said[0] == rounded(rate, 2)
        for compression, ttft, in_time in (
            ("full", said[1], said[3]),
            ("dycoke", said[2], said[4]),
        ):
            measured = both[compression]
            spread = measured["ttft_s"]
            assert_rounds_to(ttft.replace(" / ", "; "), [spread["p50"], spread["p95"]])
            assert in_time == percent(measured["good_share"])
