"""Queries as PromQL, and panels and boards as Grafana reads them."""

import json
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.panels import (
    RATE,
    Board,
    Query,
    Row,
    Variable,
    bars,
    graph,
    mean,
    number,
    quantile,
    quantiles,
    rate,
)


def as_json(built: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(JSONEncoder().encode(built.build()))
    return content


def test_a_quantile_keeps_the_buckets_bounds_beside_its_labels() -> None:
    assert quantile(0.95, "m_seconds", '{model="a"}', "policy") == (
        "histogram_quantile(0.95, sum by (le, policy) "
        f'(rate(m_seconds_bucket{{model="a"}}[{RATE}])))'
    )
    assert [query.legend for query in quantiles("m", "")] == ["p50", "p95", "p99"]


def test_a_mean_divides_rates_of_the_same_labels() -> None:
    assert mean("m", "{a='b'}", "policy") == (
        f"sum by (policy) (rate(m_sum{{a='b'}}[{RATE}])) / "
        f"sum by (policy) (rate(m_count{{a='b'}}[{RATE}]))"
    )
    assert rate("m_total", "", "x", "y") == f"sum by (x, y) (rate(m_total[{RATE}]))"


def test_a_graph_has_its_queries_in_order_under_letters() -> None:
    panel = as_json(graph("T", "why", "s", [Query("a", "A of {{x}}"), Query("b")], top=1.0))
    assert [(t["refId"], t["expr"], t["legendFormat"]) for t in panel["targets"]] == [
        ("A", "a", "A of {{x}}"),
        ("B", "b", "__auto"),
    ]
    defaults = panel["fieldConfig"]["defaults"]
    assert (defaults["unit"], defaults["min"], defaults["max"]) == ("s", 0, 1.0)
    assert "max" not in as_json(graph("T", "why", "s", [Query("a")]))["fieldConfig"]["defaults"]


def test_a_stacked_graph_says_so() -> None:
    stacked = as_json(graph("T", "why", "s", [Query("a")], is_stacked=True))
    assert stacked["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"


def test_a_number_without_a_value_says_what_that_means() -> None:
    panel = as_json(number("T", "why", "short", "up", no_value="no workers"))
    assert panel["fieldConfig"]["defaults"]["noValue"] == "no workers"
    (target,) = panel["targets"]
    assert target["expr"] == "up"


def test_ids_on_a_board_are_its_own() -> None:
    rows = [
        Row("One", [number("a", "t", "s", "a"), bars("b", "t", "s", [Query("b"), Query("c")])]),
        Row("Two", [graph("c", "t", "s", [Query("d")])]),
    ]
    board = as_json(Board("uid", "Title", "why", [Variable("model", "m_total")], rows).build())
    assert (board["uid"], board["title"], board["tags"]) == ("uid", "Title", ["dycoke"])
    ids = [panel["id"] for panel in board["panels"]]
    assert ids == list(range(1, 6)), "rows and panels alike"
    source, choice = board["templating"]["list"]
    assert source["type"] == "datasource"
    assert choice["query"] == "label_values(m_total, model)" and choice["includeAll"]
