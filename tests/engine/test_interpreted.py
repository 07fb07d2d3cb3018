"""The engine on the CUDA backend's own kernels, wherever they run: the CPU backend's numbers.

Everything else in this folder that says "cuda" runs on plain kernels where there is no GPU, which
are checked here with it. Short, because Triton's interpreter takes milliseconds per program.
"""

from typing import Any

import pytest

from tests.engine.lab import Lab
from tests.engine.recording import assert_same, report_of

ON_DEVICE: dict[str, dict[str, Any]] = {
    "default": {"num_frames": 2, "temperature": 0.9, "top_p": 0.8, "seed": 4},
    "one shot": {"num_frames": 2, "compression": {"policy": "dycoke_one_shot", "l": 2}},
}
IN_HOST_MEMORY: dict[str, dict[str, Any]] = {
    "full": {"num_frames": 1, "compression": "full"},
    "layer 1": {"num_frames": 2, "compression": {"policy": "dycoke", "l": 1, "threshold": 0.1}},
    "layer 0": {"num_frames": 2, "compression": {"policy": "lowest_kv", "l": 0}},
    "random": {"num_frames": 2, "compression": {"policy": "random_kv", "l": 1, "p": 0.4}},
}


@pytest.mark.slow
def test_the_kernels_kept_sets_are_told_as_they_were(interpreted_lab: Lab, twin: Lab) -> None:
    told = []
    for lab in (interpreted_lab, twin):
        sequence = lab.sequence(num_frames=2, question="How?", max_tokens=4)
        sequence.wants_kept_sets = True
        told.append(report_of(lab.engine().run(sequence)["a"]).kept)
    assert told[0] == told[1]
    assert told[0] is not None and told[0].last is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dp_cache", "asks"), [("device", ON_DEVICE), ("host", IN_HOST_MEMORY)], ids=["device", "host"]
)
def test_the_kernels_give_the_cpus_logits_kept_sets_and_refreshes(
    dp_cache: str, asks: dict[str, dict[str, Any]], interpreted_lab: Lab, twin: Lab
) -> None:
    engine = interpreted_lab.engine(dp_cache=dp_cache, max_running_sequences=4)
    short: dict[str, Any] = {"question": "How?", "max_tokens": 4}
    engine.run(*(interpreted_lab.sequence(name, **short, **ask) for name, ask in asks.items()))
    for name, ask in asks.items():
        assert_same(engine.recordings[name], twin.alone(**short, **ask).recording)
