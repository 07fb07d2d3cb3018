"""What a decode step of the CUDA backend launches: few kernels, whatever the batch, and no wait."""

from typing import Any

import pytest
import torch

from dycoke_core.engine.backends.cuda.decode import DecodePass
from loadtest.launch_counter import HostWait
from loadtest.launches import FIXED, PER_LAYER, count_step

LAYERS = 6

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU"
)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "dycoke"])
def test_a_step_launches_as_much_for_64_sequences_as_for_16(policy: str) -> None:
    few = count_step(16, policy, num_videos=16, num_layers=LAYERS)
    many = count_step(64, policy, num_videos=64, num_layers=LAYERS)
    shared = count_step(64, policy, num_videos=1, num_layers=LAYERS)
    assert few.launches == many.launches == shared.launches
    assert few.launches.total <= PER_LAYER * LAYERS + FIXED


@pytest.mark.parametrize("policy", ["full", "dycoke"])
def test_each_layer_adds_the_same(policy: str) -> None:
    totals = [count_step(2, policy, 2, num_layers).launches.total for num_layers in (2, 3, 5)]
    assert totals[1] - totals[0] <= PER_LAYER
    assert totals[2] - totals[1] == 2 * (totals[1] - totals[0])


def test_a_step_that_waits_for_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of the engine, which survives every other error of a step."""
    run = DecodePass.run

    def run_and_look(this: DecodePass, *args: Any) -> Any:
        results, logits = run(this, *args)
        logits.argmax(-1).tolist()
        return results, logits

    monkeypatch.setattr(DecodePass, "run", run_and_look)
    with pytest.raises(HostWait, match="tolist"):
        count_step(2, "dycoke", 2, 2)


def test_the_cpus_backend_is_counted_for_comparison() -> None:
    """Its steps wait for values, which is counted and no error."""
    count = count_step(2, "dycoke", 2, 2, backend={"backend": "cpu"})
    assert count.launches.kernels.total() == 0 and count.launches.waits
    assert count.launches.total > PER_LAYER * 2 + FIXED
