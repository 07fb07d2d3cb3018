"""One backend and a model that suits it: what the engine's invariants are tested on.

A test asks its lab for engines and sequences and is run once for each backend. When it ends, every
engine that it asked for must be empty, whole and free of leaks.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_core.config import BackendName, EngineConfig
from dycoke_core.engine.backend import SeatLayout
from dycoke_core.engine.backends.cpu.backend import CpuBackend
from dycoke_core.engine.backends.cpu.step_attention import StepAttention
from dycoke_core.engine.plan import StepPlan
from dycoke_core.model.fused import FusedDecoder
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import Sequence, SequenceReport, TokenEvent
from tests.compression.slow_loops import SlowStageTwo
from tests.engine.recording import Recording, RecordingEngine, make_sequence, report_of

# Called behind each layer's attention, stage II's selection included; may raise.
LayerHook = Callable[[StepPlan, int], None]


@dataclass(frozen=True, repr=False)
class Answer:
    """What became of a sequence."""

    sequence: Sequence
    events: list[TokenEvent]
    recording: Recording

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.output_token_ids

    @property
    def report(self) -> SequenceReport:
        return report_of(self.events)


@dataclass(eq=False, repr=False)
class Lab:
    """
    Args:
        model: on the backend's device; `reference_model`: the same on the CPU.
        settings: of every engine, unless the test says otherwise.
    """

    backend: BackendName
    directory: Path
    model: LlavaOnevision
    reference_model: LlavaOnevision
    settings: dict[str, Any]
    num_steps_compared: int = 0  # by `agreed_steps`
    num_steps_skipped: int = 0  # of those: behind a choice that hung on rounding
    _engines: list[RecordingEngine] = field(default_factory=list)
    _alone: dict[str, Answer] = field(default_factory=dict)

    @property
    def backend_class(self) -> Any:
        if self.backend == "cpu":
            return CpuBackend
        from dycoke_core.engine.backends.cuda.backend import CudaBackend  # needs Triton

        return CudaBackend

    @property
    def num_layers(self) -> int:
        return self.model.text_geometry.num_layers

    @property
    def tokens_per_frame(self) -> int:
        return self.model.tokens_per_frame

    @cached_property
    def transformers_model(self) -> LlavaOnevisionForConditionalGeneration:
        """What transformers makes of the checkpoint, by itself."""
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            self.directory, dtype=torch.float32, attn_implementation="sdpa"
        )
        return model.eval()  # type: ignore[no-any-return]

    # --- engines and sequences ---

    def engine(self, model: LlavaOnevision | None = None, **settings: Any) -> RecordingEngine:
        """An engine, which `check` will look at."""
        config = EngineConfig(backend=self.backend, **{**self.settings, **settings})
        engine = RecordingEngine(model or self.model, config)
        self._engines.append(engine)
        return engine

    def sequence(self, name: str = "a", **ask: Any) -> Sequence:
        return make_sequence(name, image_size=self.model.image_size, **ask)

    def alone(self, **ask: Any) -> Answer:
        """What becomes of a sequence that has an engine for itself. Remembered: don't change it.

        Not to be called while faults are injected.
        """
        key = repr(sorted(ask.items()))
        if key not in self._alone:
            engine, sequence = self.engine(), self.sequence("alone", **ask)
            events = engine.run(sequence)["alone"]
            self._alone[key] = Answer(sequence, events, engine.recordings["alone"])
        return self._alone[key]

    def agreed_steps(self, recording: Recording, slow: SlowStageTwo) -> int:
        """Decode steps up to the first that chose otherwise than the slow loops, all of them if
        none did. One may, where float32 cannot tell which choice is right."""
        mine = list(zip(recording.kept, recording.refreshes, strict=True))
        assert len(mine) == len(slow.steps)
        self.num_steps_compared += len(mine)
        for index, ((kept, num_refreshes), step) in enumerate(zip(mine, slow.steps, strict=True)):
            if kept.tolist() != step.kept or num_refreshes != step.num_refreshes:
                assert step.is_borderline, f"step {index} kept {kept.tolist()}, not {step.kept}"
                self.num_steps_skipped += len(mine) - index
                return index
        return len(mine)

    # --- bytes, as the backend allocates them ---

    def layout(self, **ask: Any) -> SeatLayout:
        return self._probe.admission.prepare(self.sequence(**ask)).layout

    def prefix_bytes(self, **ask: Any) -> int:
        return self._probe.backend.prefix_bytes(self.layout(**ask).prefix)

    def seat_bytes(self, **ask: Any) -> int:
        return self._probe.backend.seat_bytes(self.layout(**ask))

    @cached_property
    def _probe(self) -> RecordingEngine:
        """An engine that never runs."""
        return RecordingEngine(self.model, EngineConfig(backend=self.backend, **self.settings))

    # --- inside a pass ---

    def watch_layers(self, monkeypatch: pytest.MonkeyPatch, hook: LayerHook) -> None:
        """Calls the hook behind each layer's attention of every pass, until the test ends.

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

    @contextmanager
    def spoiled_embedding(self, token_id: int) -> Any:
        """While it lasts, whoever is fed this token gets logits that are not finite."""
        weight = self.model.model.get_input_embeddings().weight.data
        before = weight[token_id].clone()
        weight[token_id] = torch.nan
        try:
            yield
        finally:
            weight[token_id] = before

    # --- the end ---

    def check(self) -> None:
        """Runs each engine until it is idle: then it holds what nobody uses, and then nothing."""
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
