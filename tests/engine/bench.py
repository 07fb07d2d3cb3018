"""Engines of one backend over one checkpoint: what tests of any family of models run on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pytest
from torch import Tensor

from dycoke_core.config import BackendName, EngineConfig
from dycoke_core.engine.backend import SeatLayout, StepPlan
from dycoke_core.engine.backends.cpu.backend import CpuBackend
from dycoke_core.engine.backends.cpu.step_attention import StepAttention
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.model.fused import FusedDecoder
from dycoke_core.sequence import Sequence, SequenceReport, TokenEvent
from tests.engine.recording import Recording, RecordingEngine, report_of

Model = TypeVar("Model", bound=VideoLanguageModel)

# Called after each layer's attention and stage II's selection; may raise.
LayerHook = Callable[[StepPlan, int], None]


@dataclass(frozen=True, repr=False)
class Answer:
    """How a sequence ended."""

    sequence: Sequence
    events: list[TokenEvent]
    recording: Recording

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.output_token_ids

    @property
    def report(self) -> SequenceReport:
        return report_of(self.events)


class Bench(Generic[Model]):
    """A test asks its bench for engines and sequences. When it ends, every engine that it asked
    for must be empty, whole and free of leaks.

    Args:
        model: on the backend's device.
        make_sequence: makes one, by the name and whatever else a test asks.
        settings: of every engine, unless the test says otherwise.
    """

    def __init__(
        self,
        model: Model,
        backend: BackendName,
        make_sequence: Callable[..., Sequence],
        settings: dict[str, Any],
    ) -> None:
        self.model, self.backend, self.settings = model, backend, settings
        self._make_sequence = make_sequence
        self._engines: list[RecordingEngine] = []
        self._alone: dict[str, Answer] = {}
        self._probes: dict[str, RecordingEngine] = {}

    @property
    def backend_class(self) -> Any:
        if self.backend == "cpu":
            return CpuBackend
        from dycoke_core.engine.backends.cuda.backend import CudaBackend  # needs Triton

        return CudaBackend

    @property
    def num_layers(self) -> int:
        return self.model.text_geometry.num_layers

    # --- engines and sequences ---

    def engine(self, model: Model | None = None, **settings: Any) -> RecordingEngine:
        """An engine that `check` will examine."""
        config = EngineConfig(backend=self.backend, **{**self.settings, **settings})
        engine = RecordingEngine(model or self.model, config)
        self._engines.append(engine)
        return engine

    def sequence(self, name: str = "a", **ask: Any) -> Sequence:
        return self._make_sequence(name, **ask)

    def alone(self, **ask: Any) -> Answer:
        """How a sequence ends that has an engine for itself. Cached: do not change it.

        Not to be called while faults are injected.
        """
        key = repr(sorted(ask.items()))
        if key not in self._alone:
            engine, sequence = self.engine(), self.sequence("alone", **ask)
            events = engine.run(sequence)["alone"]
            self._alone[key] = Answer(sequence, events, engine.recordings["alone"])
        return self._alone[key]

    # --- bytes, as the backend allocates them ---

    def layout(self, **ask: Any) -> SeatLayout:
        return self._probe().admission.prepare(self.sequence(**ask)).layout

    def prefix_bytes(self, **ask: Any) -> int:
        return self._probe().backend.prefix_bytes(self.layout(**ask).prefix)

    def seat_bytes(self, **ask: Any) -> int:
        return self._probe().backend.seat_bytes(self.layout(**ask))

    def sequence_bytes(self, ask: dict[str, Any], **settings: Any) -> int:
        """Of prefix and seat together, in an engine of these settings."""
        probe = self._probe(**settings)
        layout = probe.admission.prepare(self.sequence(**ask)).layout
        return probe.backend.prefix_bytes(layout.prefix) + probe.backend.seat_bytes(layout)

    def _probe(self, **settings: Any) -> RecordingEngine:
        """An engine that never runs."""
        key = repr(sorted(settings.items()))
        if key not in self._probes:
            config = EngineConfig(backend=self.backend, **{**self.settings, **settings})
            self._probes[key] = RecordingEngine(self.model, config)
        return self._probes[key]

    # --- inside a pass ---

    def watch_layers(self, monkeypatch: pytest.MonkeyPatch, hook: LayerHook) -> None:
        """Calls the hook after each layer's attention in every pass, until the test ends.

        Not in passes that a GPU replays from a graph.
        """
        plans: list[StepPlan] = []
        backend = self.backend_class
        run = backend.run

        def run_noting_plan(this: Any, plan: StepPlan) -> Any:
            plans[:] = [plan]
            return run(this, plan)

        monkeypatch.setattr(backend, "run", run_noting_plan)
        if self.backend == "cpu":
            attend = StepAttention.attend

            def attend_and_tell(this: Any, layer: int, *arguments: Any) -> Tensor:
                output = attend(this, layer, *arguments)
                hook(plans[0], layer)
                return output

            monkeypatch.setattr(StepAttention, "attend", attend_and_tell)
            return
        run_layers = FusedDecoder.run

        def run_layers_and_tell(this: Any, *arguments: Any, **named: Any) -> Tensor:
            *others, attend = arguments

            def attend_and_tell(layer: int, *tensors: Tensor) -> Tensor:
                output = attend(layer, *tensors)
                hook(plans[0], layer)
                return output  # type: ignore[no-any-return]

            return run_layers(this, *others, attend_and_tell, **named)

        monkeypatch.setattr(FusedDecoder, "run", run_layers_and_tell)

    # --- the end ---

    def check(self) -> None:
        """Runs each engine until it is idle and holds its caches alone, then clears them: it holds
        nothing."""
        engines, self._engines = self._engines, []
        for engine in engines:
            engine.drain()
            assert engine.stats().kv_bytes_in_use == 0
            check_idle(engine)
            engine.clear_caches()
            assert engine.stats().kv_bytes_cached == 0
            assert engine.admission.host_budget.used_bytes == 0
            assert engine.backend.allocated_bytes() == 0
            check_idle(engine)


def check_idle(engine: RecordingEngine) -> None:
    """With no sequence in it, an engine holds what its caches count, each page once."""
    assert not engine.has_work and not engine.states
    assert engine.admission.leaked_bytes == 0
    engine.backend.check(num_prefixes=engine.admission.num_prefixes)
