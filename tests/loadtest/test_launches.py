"""What a decode step asks of a GPU, at 28 layers: the same for every batch, and little of it."""

from collections import Counter
from typing import Any

import pytest
import torch

from dycoke_core.engine.backends.cuda.decode import DecodePass
from dycoke_core.sequence import Sequence
from loadtest.gpu.workbench import Workbench
from loadtest.launch_counter import HostWait
from loadtest.launches import FIXED, LAYERS, PER_LAYER, count_all, count_step

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU"
)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_decode_step_launches_as_much_for_64_sequences_as_for_16() -> None:
    """Counting fails where anything in the step waits for the device."""
    torch.set_num_threads(1)
    counts = count_all((16, 64))
    assert len(counts) == 8  # of two batches, two policies, own videos and one
    assert all(count.launches.total <= PER_LAYER * LAYERS + FIXED for count in counts)
    for policy in ("full", "dycoke"):
        assert len({c.launches.total for c in counts if c.policy == policy}) == 1


@pytest.mark.parametrize("policy", ["full", "dycoke"])
def test_each_layer_adds_the_same(policy: str) -> None:
    totals = [count_step(2, policy, 2, num_layers).launches.total for num_layers in (2, 3, 5)]
    assert totals[1] - totals[0] <= PER_LAYER
    assert totals[2] - totals[1] == 2 * (totals[1] - totals[0])


@pytest.mark.parametrize("num_asking", [1, 2])
def test_kept_sets_cost_a_copy_for_each_sequence_that_wants_them_and_no_wait(
    num_asking: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = count_step(2, "dycoke", 2, 2).launches
    make, made = Workbench.sequence, []

    def make_asking(*args: Any, **options: Any) -> Sequence:
        sequence = make(*args, **options)
        made.append(sequence)
        sequence.wants_kept_sets = len(made) > 2 and len(made) <= 2 + num_asking  # 2 to fill
        return sequence

    monkeypatch.setattr(Workbench, "sequence", make_asking)
    asking = count_step(2, "dycoke", 2, 2).launches
    assert len(made) == 4
    assert asking.kernels == usual.kernels
    assert asking.operations - usual.operations == Counter({"copy_": num_asking})


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
