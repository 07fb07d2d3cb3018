"""The fake engine has the interface of the real one."""

import inspect

import pytest

from dycoke_core import engine
from tests.integration.fake_engine import FakeEngine


@pytest.mark.parametrize("name", ["add", "abort", "step", "stats", "give_frames"])
def test_methods_have_the_same_signature(name: str) -> None:
    real, fake = getattr(engine.Engine, name), getattr(FakeEngine, name)
    assert list(inspect.signature(real).parameters) == list(inspect.signature(fake).parameters)


@pytest.mark.parametrize("name", ["has_work", "waiting_for_frames"])
def test_properties_are_properties(name: str) -> None:
    assert isinstance(getattr(engine.Engine, name), property)
    assert isinstance(getattr(FakeEngine, name), property)
