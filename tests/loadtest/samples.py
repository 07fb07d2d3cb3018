"""What a run of the load generator left behind, without a run."""

from typing import Any

from loadtest.runs import Plan

CLOSED = Plan("full", users=2, rate=0.0, duration_s=10.0, num_frames=32, seed=1)
OPEN = Plan("full", users=0, rate=1.5, duration_s=10.0, num_frames=32, seed=1)


def raw(**samples: list[tuple[float, float]]) -> dict[str, Any]:
    """Samples by kind and name: of each the moment in the run, and the seconds."""
    return {
        "failures": [],
        "max_stall_s": 0.1,
        "arrivals": {"ask_new": 2, "ask_again": 2, "upload": 3},
        "samples": {name.replace("_", " "): values for name, values in samples.items()},
        "locust": [],
    }
