"""Engines over one family's small checkpoint, for tests that run on both backends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, TypeVar

from dycoke_core.config import BackendName, EngineConfig
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.sequence import Sequence
from tests.engine.conftest import installed_plain_kernels, need_triton
from tests.engine.lab import check_idle
from tests.engine.recording import Recording, RecordingEngine, report_of

Model = TypeVar("Model", bound=VideoLanguageModel)


class Bench(Generic[Model]):
    """Engines of one backend, each of which must be empty in the end.

    Args:
        sequence: makes one, by the name and whatever else a test asks.
    """

    def __init__(
        self, model: Model, backend: BackendName, sequence: Callable[..., Sequence]
    ) -> None:
        self.model, self.backend, self.sequence = model, backend, sequence
        self._engines: list[RecordingEngine] = []

    def engine(self, **settings: Any) -> RecordingEngine:
        usual = {
            "max_running_sequences": 8,
            "vision_slice_layers": 1,
            "kv_cache_bytes": 2**23,
            "host_cache_bytes": 2**22,
        }
        config = EngineConfig(backend=self.backend, **{**usual, **settings})
        self._engines.append(RecordingEngine(self.model, config))  # type: ignore[arg-type]
        return self._engines[-1]

    def alone(self, **ask: Any) -> Recording:
        engine = self.engine()
        report_of(engine.run(self.sequence("alone", **ask))["alone"])
        return engine.recordings["alone"]

    def answer(self, **ask: Any) -> tuple[int, ...]:
        asked = self.sequence("alone", **ask)
        self.engine().run(asked)
        return tuple(asked.output_token_ids)

    def check(self) -> None:
        for engine in self._engines:
            engine.drain()
            check_idle(engine)
            engine.clear_caches()
            assert engine.backend.allocated_bytes() == 0


@contextmanager
def bench_of(
    model: Model, backend: BackendName, sequence: Callable[..., Sequence]
) -> Iterator[Bench[Model]]:
    """On "cuda" the kernels are plain operations, which Triton's interpreter would take minutes
    for."""
    if backend == "cuda":
        need_triton()
    with nullcontext([]) if backend == "cpu" else installed_plain_kernels() as violations:
        bench = Bench(model, backend, sequence)
        yield bench
        bench.check()
        assert not violations
