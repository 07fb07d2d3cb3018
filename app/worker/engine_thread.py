"""The one thread that owns the engine. The event loop talks to it through commands.

Between two steps the thread carries out what has been asked of it, so an abort takes effect within
one step; with no work it sleeps until asked. What a step did comes back to the event loop in order
and ahead of the answer to any later command: once `abort` has returned, no event of the sequence
will come.

The inbox holds at most what the running jobs ask for. An exception out of a step is the engine's
end: `wait_for_failure` raises it, and all commands fail.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dycoke_core.auto import AutoConfig, Choice
from dycoke_core.engine_card import EngineCard, EngineStats
from dycoke_core.errors import EngineError, ModelLoadError
from dycoke_core.level_choice import Outlook
from dycoke_core.sequence import Sequence, Stage, TokenEvent

if TYPE_CHECKING:
    from dycoke_core.engine import Engine

PROGRESS_STEP = 0.1  # a status event at most every tenth of a stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageChange:
    sequence_id: str
    stage: Stage  # encoding or prefilling
    progress: float


@dataclass(frozen=True, slots=True)
class Update:
    """What one step did."""

    tokens: list[TokenEvent]
    stages: list[StageChange]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class _Command:
    """Args:
    is_due: whether a busy engine should run it now; asked again after every step. An idle engine
        runs it at once.
    """

    run: "Callable[[Engine], Any]"
    reply: "asyncio.Future[Any]"
    is_due: "Callable[[Engine], bool]" = lambda engine: True


class EngineThread:
    """Args:
    make_engine: loads the engine; called on the thread.
    """

    def __init__(self, make_engine: "Callable[[], Engine]") -> None:
        self._make_engine = make_engine
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._card: asyncio.Future[EngineCard] = self._loop.create_future()
        self._failure: asyncio.Future[None] = self._loop.create_future()
        for future in (self._card, self._failure):
            future.add_done_callback(_consume)
        self._not_due: list[_Command] = []  # the thread's own, while it runs
        self._step_began_at: float | None = None
        self._stages = _StageWatch()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, on_update: Callable[[Update], None]) -> None:
        """Loads the engine and runs it; once.

        Args:
            on_update: called on the event loop after each step.
        """
        self._on_update = on_update
        self._thread.start()

    async def card(self) -> EngineCard:
        """Waits until the engine is loaded; raises what loading raised."""
        return await asyncio.shield(self._card)

    async def wait_for_failure(self) -> None:
        """Returns never; raises what ended the engine."""
        await asyncio.shield(self._failure)

    async def add(self, sequence: Sequence) -> None:
        """Raises DycokeError: the engine does not take the sequence."""
        await self._ask(lambda engine: self._add(engine, sequence))

    async def has_prefix(self, sequence: Sequence, config: AutoConfig) -> bool:
        """Whether a prefix that policy `auto` may take is there or on its way.

        Raises:
            DycokeError: the engine does not take the sequence at any level.
        """
        has_prefix: bool = await self._ask(lambda engine: engine.has_prefix(sequence, config))
        return has_prefix

    async def choose_compression(
        self,
        sequence: Sequence,
        config: AutoConfig,
        outlook: Callable[[], Outlook],
        *,
        accepted_at_s: float,
        may_wait: bool = True,
    ) -> Choice:
        """Chooses as soon as the engine has little else to do.

        Args:
            outlook: called then, on the thread.
            may_wait: False: chooses at once.
            accepted_at_s: Unix time.

        Raises:
            DycokeError: the engine does not take the sequence at any level.
        """

        def choose(engine: "Engine") -> Choice:
            waited_s = max(time.time() - accepted_at_s, 0.0)
            return engine.choose_compression(sequence, config, outlook(), waited_s=waited_s)

        def is_due(engine: "Engine") -> bool:
            is_late = time.time() - accepted_at_s >= config.objective_s  # others may overtake
            return not may_wait or is_late or engine.can_choose(config, sequence.priority)

        choice: Choice = await self._ask(choose, is_due)
        return choice

    async def predict_first_token_s(self, sequence: Sequence) -> float | None:
        """See `Engine.predict_first_token_s`."""
        seconds: float | None = await self._ask(
            lambda engine: engine.predict_first_token_s(sequence)
        )
        return seconds

    def abort(self, sequence_id: str) -> "asyncio.Future[bool]":
        """Asks at once; the result, whether the engine had the sequence, need not be awaited."""
        return self._ask(lambda engine: self._abort(engine, sequence_id))

    def forget_video(self, name: str) -> None:
        """Asks at once, see `Engine.forget_video`."""
        self._ask(lambda engine: engine.forget_video(name))

    def step_age_s(self) -> float:
        """For how long the current step has been running; 0 between steps."""
        began_at = self._step_began_at
        return time.monotonic() - began_at if began_at is not None else 0.0

    def stop(self, *, timeout_s: float) -> bool:
        """Ends the thread after the current step; False if that takes longer than `timeout_s`."""
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _ask(
        self,
        run: "Callable[[Engine], Any]",
        is_due: "Callable[[Engine], bool]" = lambda engine: True,
    ) -> "asyncio.Future[Any]":
        reply = self._loop.create_future()
        if self._failure.done():
            reply.set_exception(EngineError("the engine has stopped"))
        else:
            self._inbox.put(_Command(run, reply, is_due))
        reply.add_done_callback(_consume)
        return reply

    # --- on the thread ---

    def _run(self) -> None:
        try:
            engine = self._make_engine()
            self._post(_resolve, self._card, engine.card)
            self._serve(engine)
        except ModelLoadError as error:  # which says all; the process tells it
            self._post(self._fail, error)
        except Exception as error:
            logger.exception("the engine stopped")
            self._post(self._fail, error)

    def _serve(self, engine: "Engine") -> None:
        while True:
            self._not_due = [c for c in self._not_due if not self._carry_out(engine, c)]
            if engine.has_work and self._inbox.empty():
                self._step_began_at = time.monotonic()
                tokens = engine.step()
                self._step_began_at = None
                self._stages.forget(event.sequence_id for event in tokens)
                self._report(engine, tokens)
                continue
            command = self._inbox.get()
            if command is None:
                return
            if not self._carry_out(engine, command):
                self._not_due.append(command)

    def _carry_out(self, engine: "Engine", command: _Command) -> bool:
        """False: its time has not come."""
        try:
            if engine.has_work and not command.is_due(engine):
                return command.reply.cancelled()
            result = command.run(engine)
        except Exception as error:
            self._post(_reject, command.reply, error)
        else:
            self._post(_resolve, command.reply, result)
        return True

    def _add(self, engine: "Engine", sequence: Sequence) -> None:
        engine.add(sequence)
        self._stages.watch(sequence)

    def _abort(self, engine: "Engine", sequence_id: str) -> bool:
        self._stages.forget([sequence_id])
        had_it = engine.abort(sequence_id)
        self._report(engine, [])
        return had_it

    def _report(self, engine: "Engine", tokens: list[TokenEvent]) -> None:
        self._post(self._hand_over, Update(tokens, self._stages.changes(), engine.stats()))

    def _post(self, call: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(call, *args)

    # --- on the event loop again ---

    def _hand_over(self, update: Update) -> None:
        try:
            self._on_update(update)
        except Exception as error:  # nobody would miss the events of a callback that only logs
            logger.exception("a step's outcome could not be handed over")
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """The thread may still be running, and may be asked to stop meanwhile."""
        for future in (self._failure, self._card):
            _reject(future, error)
        commands: list[_Command | None] = [*self._not_due]
        with suppress(queue.Empty):
            while True:
                commands.append(self._inbox.get_nowait())
        for command in commands:
            if command is not None:
                _reject(command.reply, EngineError("the engine has stopped"))
        if None in commands:
            self._inbox.put(None)


class _StageWatch:
    """Progress of sequences before their first token; reports significant changes."""

    def __init__(self) -> None:
        self._sequences: dict[str, Sequence] = {}
        self._told: dict[str, tuple[Stage, int]] = {}

    def watch(self, sequence: Sequence) -> None:
        self._sequences[sequence.sequence_id] = sequence

    def forget(self, sequence_ids: Iterable[str]) -> None:
        for sequence_id in sequence_ids:
            self._sequences.pop(sequence_id, None)
            self._told.pop(sequence_id, None)

    def changes(self) -> list[StageChange]:
        changes = []
        for sequence_id, sequence in list(self._sequences.items()):
            stage, progress = sequence.stage, sequence.progress
            if stage in (Stage.DECODING, Stage.FINISHED):
                self.forget([sequence_id])
            elif stage is not Stage.WAITING:
                here = (stage, int(progress / PROGRESS_STEP))
                if self._told.get(sequence_id) != here:
                    self._told[sequence_id] = here
                    changes.append(StageChange(sequence_id, stage, progress))
        return changes


def _resolve(future: "asyncio.Future[Any]", result: object) -> None:
    if not future.done():
        future.set_result(result)


def _reject(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _consume(future: "asyncio.Future[Any]") -> None:
    """Marks an outcome as seen, where nobody waits for it."""
    if not future.cancelled():
        future.exception()
