"""The thread that owns the engine: order, aborts, failures."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from app.worker.choice_request import ChoiceRequest
from app.worker.engine_thread import MAX_LAG_S, EngineThread, Update
from dycoke_core.auto import DEFAULT_LADDER, AutoConfig, Choice
from dycoke_core.errors import EngineError, PromptTooLongError
from dycoke_core.level_choice import Outlook
from dycoke_core.sequence import ChatMessage, SamplingParams, Sequence, Stage, TokenEvent
from tests.integration.fake_engine import FakeEngine, answer


def sequence(question: str, max_tokens: int = 5) -> Sequence:
    return Sequence(
        sequence_id=question,
        messages=(ChatMessage("user", question),),
        frames=np.zeros((1, 8, 8, 3), np.uint8),
        sampling=SamplingParams(max_tokens=max_tokens),
    )


class Running:
    """A thread and all that its engine did."""

    def __init__(
        self,
        on_update: Callable[[Update], None] | None = None,
        make_engine: Callable[[], FakeEngine] = FakeEngine,
    ) -> None:
        self.engine = make_engine()
        self.updates: list[Update] = []
        self.thread = EngineThread(lambda: self.engine)
        self.thread.start(on_update or self.updates.append)

    def token_ids(self, sequence_id: str) -> list[int]:
        events = [event for update in self.updates for event in update.tokens]
        return [t for e in events if e.sequence_id == sequence_id for t in e.token_ids]

    async def wait_for_tokens(self, sequence_id: str, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.token_ids(sequence_id)) < count:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running(
    on_update: Callable[[Update], None] | None = None,
    make_engine: Callable[[], FakeEngine] = FakeEngine,
) -> AsyncIterator[Running]:
    running = Running(on_update, make_engine)
    yield running
    assert await asyncio.to_thread(running.thread.stop, timeout_s=30)


async def test_card_is_there_once_the_engine_is_loaded() -> None:
    async with running() as engine:
        assert await engine.thread.card() == engine.engine.card


async def test_events_come_in_order_with_stages_before_tokens() -> None:
    async with running() as engine:
        await engine.thread.add(sequence("why?"))
        await engine.wait_for_tokens("why?", 5)
    assert engine.token_ids("why?") == answer("why?", 5)
    stages = [change.stage for update in engine.updates for change in update.stages]
    assert stages == [Stage.ENCODING, Stage.PREFILLING]


async def test_engine_lets_the_loop_keep_up() -> None:
    question = "sleep:0.001"
    async with running() as engine:
        await engine.thread.add(sequence(question, max_tokens=10_000))
        await engine.wait_for_tokens(question, 1)
        made = engine.engine.seen[0].output_token_ids
        before, began_at = len(made), time.monotonic()
        time.sleep(0.3)  # the loop takes nothing meanwhile
        num_steps = len(made) - before
        assert num_steps <= (time.monotonic() - began_at) / MAX_LAG_S + 2
        assert await engine.thread.abort(question)


class PreemptedEngine(FakeEngine):
    """Its sequences come to these stages, one after another, before their first tokens."""

    STAGES = (
        (Stage.ENCODING, 0.5),
        (Stage.PREFILLING, 0.2),
        (Stage.WAITING, 0.0),
        (Stage.ENCODING, 0.0),
        (Stage.PREFILLING, 0.1),
        (Stage.PREFILLING, 0.7),
    )

    def __init__(self) -> None:
        super().__init__()
        self._stages = list(self.STAGES)
        self._sequence: Sequence | None = None

    def add(self, sequence: Sequence) -> None:
        self._sequence = sequence
        super().add(sequence)

    def step(self) -> list[TokenEvent]:
        if not self._stages:
            return super().step()
        assert self._sequence is not None
        self._sequence.stage, self._sequence.progress = self._stages.pop(0)
        return []


async def test_progress_of_who_made_room_never_goes_back() -> None:
    async with running(make_engine=PreemptedEngine) as engine:
        await engine.thread.add(sequence("why?"))
        await engine.wait_for_tokens("why?", 5)
    changes = [change for update in engine.updates for change in update.stages]
    told = [(change.stage, change.progress) for change in changes]
    assert told[:3] == [(Stage.ENCODING, 0.5), (Stage.PREFILLING, 0.2), (Stage.PREFILLING, 0.7)]


async def test_no_event_comes_after_an_abort() -> None:
    async with running() as engine:
        await engine.thread.add(sequence("sleep:0.005", max_tokens=10_000))
        await engine.wait_for_tokens("sleep:0.005", 3)
        assert await engine.thread.abort("sleep:0.005")
        count = len(engine.token_ids("sleep:0.005"))
        await asyncio.sleep(0.05)
        assert len(engine.token_ids("sleep:0.005")) == count
        assert engine.updates[-1].stats.num_running == 0
        assert not await engine.thread.abort("sleep:0.005")


async def test_a_choice_waits_for_its_time_and_holds_up_no_other_command() -> None:
    async with running() as engine:
        engine.engine.may_choose = False
        await engine.thread.add(sequence("sleep:0.001", max_tokens=10_000))
        choosing = asyncio.create_task(choose(engine.thread, "why?"))
        await engine.wait_for_tokens("sleep:0.001", 5)
        await engine.thread.add(sequence("other"))
        await engine.wait_for_tokens("other", 5)
        assert not choosing.done()
        engine.engine.may_choose = True
        assert (await choosing).level == engine.engine.auto_level
        await engine.thread.abort("sleep:0.001")


async def test_a_choice_is_made_once_there_is_no_work() -> None:
    async with running() as engine:
        engine.engine.may_choose = False
        await engine.thread.add(sequence("sleep:0.001", max_tokens=10_000))
        choosing = asyncio.create_task(choose(engine.thread, "why?"))
        await engine.wait_for_tokens("sleep:0.001", 3)
        await engine.thread.abort("sleep:0.001")
        async with asyncio.timeout(30):
            await choosing


async def test_a_choice_is_due_when_a_prefix_of_its_comes() -> None:
    async with running() as engine:
        engine.engine.may_choose = False
        await engine.thread.add(sequence("sleep:0.001", max_tokens=10_000))
        asked = request("video:a why?")
        assert not await engine.thread.choose_cached(asked) and len(asked.prefix_keys) == 4
        choosing = asyncio.create_task(engine.thread.choose_compression(asked))
        count = len(engine.token_ids("sleep:0.001"))
        await engine.wait_for_tokens("sleep:0.001", count + 3)
        assert not choosing.done()
        other = sequence("video:a when?")
        other.compression = DEFAULT_LADDER[2]
        assert await engine.thread.add(other) in asked.prefix_keys
        async with asyncio.timeout(30):
            assert (await choosing).level == 2
        await engine.thread.abort("sleep:0.001")


async def test_a_choice_that_nobody_waits_for_is_forgotten() -> None:
    async with running() as engine:
        engine.engine.may_choose = False
        await engine.thread.add(sequence("sleep:0.001", max_tokens=10_000))
        choosing = asyncio.create_task(choose(engine.thread, "why?"))
        await engine.wait_for_tokens("sleep:0.001", 3)
        choosing.cancel()
        count = len(engine.token_ids("sleep:0.001"))
        await engine.wait_for_tokens("sleep:0.001", count + 3)
        await engine.thread.abort("sleep:0.001")
    assert not engine.engine.outlooks


async def test_a_choice_that_nobody_waits_for_is_not_made_when_it_is_due() -> None:
    async with running() as engine:
        engine.engine.may_choose = False
        await engine.thread.add(sequence("sleep:0.5", max_tokens=10_000))
        choosing = asyncio.create_task(choose(engine.thread, "why?"))
        async with asyncio.timeout(30):
            while not engine.engine.num_asked_to_choose:
                await asyncio.sleep(0.005)
        choosing.cancel()
        await asyncio.gather(choosing, return_exceptions=True)
        engine.engine.may_choose = True
        await engine.thread.abort("sleep:0.5")
    assert not engine.engine.outlooks


async def test_a_failing_engine_fails_the_choice_that_waits() -> None:
    running = Running()
    running.engine.may_choose = False
    await running.thread.add(sequence("raise sleep:0.001"))
    with pytest.raises(EngineError, match="has stopped"):
        await choose(running.thread, "why?")
    await asyncio.to_thread(running.thread.stop, timeout_s=30)


async def choose(thread: EngineThread, question: str) -> Choice:
    return await thread.choose_compression(request(question))


def request(question: str) -> ChoiceRequest:
    now_s = time.time()
    return ChoiceRequest(
        sequence(question), AutoConfig(), Outlook, accepted_at_s=now_s, queued_at_s=now_s
    )


async def test_refusal_is_raised_where_the_sequence_was_added() -> None:
    async with running() as engine:
        with pytest.raises(PromptTooLongError):
            await engine.thread.add(sequence("refuse"))
        await engine.thread.add(sequence("why?"))
        await engine.wait_for_tokens("why?", 5)


async def test_failing_step_ends_the_engine_and_all_commands() -> None:
    async with running() as engine:
        failure = asyncio.create_task(engine.thread.wait_for_failure())
        await engine.thread.add(sequence("raise"))
        with pytest.raises(RuntimeError, match="the device is lost"):
            await failure
        with pytest.raises(EngineError):
            await engine.thread.add(sequence("why?"))
        with pytest.raises(EngineError):
            await engine.thread.abort("raise")


async def test_outcome_that_cannot_be_handed_over_ends_the_engine() -> None:
    def refuse(update: Update) -> None:
        raise ValueError("no")

    async with running(refuse) as engine:
        failure = asyncio.create_task(engine.thread.wait_for_failure())
        await engine.thread.add(sequence("why?"))
        with pytest.raises(ValueError):
            await failure


async def test_failure_to_load_reaches_whoever_waits_for_the_card() -> None:
    def fail() -> FakeEngine:
        raise OSError("no such file")

    thread = EngineThread(fail)
    thread.start(lambda update: None)
    with pytest.raises(OSError):
        await thread.card()
    assert await asyncio.to_thread(thread.stop, timeout_s=30)


async def test_step_that_hangs_shows_its_age() -> None:
    async with running() as engine:
        assert engine.thread.step_age_s() == 0.0
        await engine.thread.add(sequence("sleep:0.2", max_tokens=1))
        async with asyncio.timeout(30):
            while engine.thread.step_age_s() < 0.1:
                await asyncio.sleep(0.005)
            while engine.thread.step_age_s() > 0:
                await asyncio.sleep(0.005)
        await engine.thread.abort("sleep:0.2")
