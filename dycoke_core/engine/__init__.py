"""The inference engine: `Engine.add`, `Engine.abort`, `Engine.step`."""

from dycoke_core.engine.engine import Engine
from dycoke_core.sequence import SamplingParams, Sequence

__all__ = ["Engine", "SamplingParams", "Sequence"]
