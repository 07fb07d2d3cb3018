"""The fake engine has the interface of the real one."""

import inspect
from dataclasses import fields

import pytest

from dycoke_core import engine
from tests.integration import fake_engine
from tests.integration.fake_engine import FakeEngine


@pytest.mark.parametrize("name", ["EngineCard", "EngineStats"])
def test_messages_have_the_same_fields(name: str) -> None:
    real, fake = getattr(engine, name), getattr(fake_engine, name)
    assert {(f.name, f.type) for f in fields(real)} == {(f.name, f.type) for f in fields(fake)}


@pytest.mark.parametrize("name", ["add", "abort", "step", "stats"])
def test_methods_have_the_same_signature(name: str) -> None:
    real, fake = getattr(engine.Engine, name), getattr(FakeEngine, name)
    assert list(inspect.signature(real).parameters) == list(inspect.signature(fake).parameters)
    assert isinstance(engine.Engine.has_work, property)
