"""Decode steps by graphs, without a device: what is replayed calls the captured function again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.lab import Lab
from tests.engine.recording import assert_same

BACKEND = "dycoke_core.engine.backends.cuda.backend"
pytestmark = [
    pytest.mark.parametrize("lab", ["cuda"], indirect=True),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has the device's own graphs"),
]


@dataclass(frozen=True)
class CalledAgain:
    """A graph: its results replace the first ones in place."""

    run: Callable[[], tuple[Tensor, Tensor]]
    outputs: tuple[Tensor, Tensor]

    def replay(self) -> None:
        for output, result in zip(self.outputs, self.run(), strict=True):
            output.copy_(result)


@dataclass
class Maker:
    fails: bool = False
    num_captures: int = 0

    def __call__(self, device: torch.device) -> "Maker":
        return self

    def capture(self, run: Callable[[], tuple[Tensor, Tensor]]) -> CalledAgain:
        self.num_captures += 1
        if self.fails:
            raise torch.OutOfMemoryError("no memory")
        results, logits = run()
        return CalledAgain(run, (results.clone(), logits.clone()))

    def wait(self) -> None: ...

    def release(self) -> None: ...

    def free_bytes(self) -> int:
        return 0


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Maker:
    maker = Maker()
    monkeypatch.setattr(f"{BACKEND}.CudaGraphs", maker)
    monkeypatch.setattr(f"{BACKEND}.EAGER_STEPS", 3)
    return maker


ASKS: dict[str, dict[str, Any]] = {
    "one": {"max_tokens": 12, "compression": {"policy": "dycoke", "threshold": 0.1}},
    "two": {"max_tokens": 9, "video": 2, "compression": "full"},
}


def assert_answers_as_alone(engine: Any, lab: Lab) -> None:
    engine.run(*(lab.sequence(name, **ask) for name, ask in ASKS.items()))
    for name, ask in ASKS.items():
        assert_same(engine.recordings.pop(name), lab.alone(**ask).recording)


def test_replayed_steps_answer_as_eager_ones(lab: Lab, maker: Maker) -> None:
    engine = lab.engine()
    engine.backend.capture_graphs()
    assert maker.num_captures > 0
    assert_answers_as_alone(engine, lab)


def test_graphs_captured_between_two_steps_change_no_answer(lab: Lab, maker: Maker) -> None:
    """Steps after memory ran out, while answers are under way."""
    engine = lab.engine()
    engine.backend.capture_graphs()
    num_captures = maker.num_captures
    engine.backend.release_idle_memory()
    assert_answers_as_alone(engine, lab)
    assert maker.num_captures == 2 * num_captures


def test_a_capture_that_fails_is_tried_again_later_and_later(lab: Lab, maker: Maker) -> None:
    engine = lab.engine()
    maker.fails = True
    engine.backend.capture_graphs()
    engine.backend.release_idle_memory()
    tries = []
    for _ in range(5):
        assert_answers_as_alone(engine, lab)
        tries.append(maker.num_captures)
    assert tries[0] == 2  # at once, and after 3 steps
    assert tries[-1] == 3  # after 24 more; the next one is due after 192
    maker.fails = False
    for _ in range(18):
        assert_answers_as_alone(engine, lab)
    assert maker.num_captures > 4
