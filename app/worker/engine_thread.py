"""The one thread that owns the engine. The event loop talks to it through commands.

Between two steps the thread carries out the commands, so an abort takes effect within one step;
without work it sleeps until a command comes. The events of a step reach the event loop in order,
and before the reply to any later command: once `abort` has returned, no event of the sequence will
come.

The thread lets the event loop keep up: after a step it waits until the loop has taken the update of
the step before, at most `MAX_LAG_S`. A thread that runs one short operation after the other hardly
leaves Python's lock (the GIL) to anyone who is slow to wake up, and tokens would stay here for
seconds.

The inbox holds at most what the running jobs ask for. An exception from a step ends the engine:
`wait_for_failure` raises it, and all commands fail.
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

from app.worker.choice_request import ChoiceRequest
from dycoke_core.auto import Choice
from dycoke_core.engine_card import EngineCard, EngineStats
from dycoke_core.errors import DycokeError, EngineError, ModelLoadError
from dycoke_core.sequence import Sequence, Stage, TokenEvent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dycoke_core.engine import Engine

MAX_LAG_S = 0.02  # far longer than the loop takes for an update, if it gets to run
PROGRESS_STEP = 0.1  # a status event at most every tenth of a stage
_STAGES = (Stage.ENCODING, Stage.PREFILLING)  # in their order

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
    wants_frames: tuple[str, ...] = ()  # sequences that wait for frames since the last update


@dataclass(frozen=True, slots=True)
class _Command:
    """Args:
    is_due: whether a busy engine should run it now; asked again after every step. An idle engine
        runs it at once. None: it is run in any case, also if no caller waits for it any more.
    """

    run: "Callable[[Engine], Any]"
    reply: "asyncio.Future[Any]"
    is_due: "Callable[[Engine], bool] | None" = None


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
        self._not_due: list[_Command] = []  # used only by the thread, while it runs
        self._waiting_for_frames: tuple[str, ...] = ()  # as last reported; used only by the thread
        self._step_began_at: float | None = None
        self._is_taken = threading.Event()  # the last update, by the loop
        self._is_taken.set()
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
        """Never returns; raises the exception that ended the engine."""
        await asyncio.shield(self._failure)

    async def add(self, sequence: Sequence) -> str:
        """Returns the key of its prefix, see `Engine.add`.

        Raises DycokeError: the engine does not take the sequence.
        """
        prefix_key: str = await self._ask(lambda engine: self._add(engine, sequence))
        return prefix_key

    async def give_frames(self, sequence_id: str, frames: "npt.NDArray[np.uint8]") -> None:
        """See `Engine.give_frames`. One that waits again is in a later update's `wants_frames`.

        Raises:
            DycokeError: the engine does not take the frames.
        """
        await self._ask(lambda engine: self._give_frames(engine, sequence_id, frames))

    async def prefix_key(self, sequence: Sequence) -> str:
        """See `Engine.prefix_key`."""
        prefix_key: str = await self._ask(lambda engine: engine.prefix_key(sequence))
        return prefix_key

    async def has_prefix(self, key: str) -> bool:
        """See `Engine.has_prefix`."""
        has_prefix: bool = await self._ask(lambda engine: engine.has_prefix(key))
        return has_prefix

    async def choose_cached(self, request: ChoiceRequest) -> bool:
        """See `ChoiceRequest.choose_cached`."""
        has_choice: bool = await self._ask(request.choose_cached)
        return has_choice

    async def choose_compression(self, request: ChoiceRequest) -> Choice:
        """Chooses once the request is due, or the engine has nothing to do.

        Raises:
            DycokeError: the engine does not take the sequence at any level.
        """
        choice: Choice = await self._ask(request.choose, request.is_due)
        return choice

    async def predict_first_token_s(self, sequence: Sequence) -> float | None:
        """See `Engine.predict_first_token_s`."""
        seconds: float | None = await self._ask(
            lambda engine: engine.predict_first_token_s(sequence)
        )
        return seconds

    def abort(self, sequence_id: str) -> "asyncio.Future[bool]":
        """Sends the command at once. The result (whether the engine had it) need not be awaited."""
        return self._ask(lambda engine: self._abort(engine, sequence_id))

    def forget_video(self, name: str) -> None:
        """Sends the command at once, see `Engine.forget_video`."""
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
        is_due: "Callable[[Engine], bool] | None" = None,
    ) -> "asyncio.Future[Any]":
        reply = self._loop.create_future()
        if self._failure.done():
            reply.set_exception(
                EngineError("the worker's engine has stopped: post the request again")
            )
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
            if not self._take_command(engine):
                return

    def _take_command(self, engine: "Engine") -> bool:
        """Waits for one, and keeps no hold of it: it may have frames. False: the thread is to
        end."""
        command = self._inbox.get()
        if command is not None and not self._carry_out(engine, command):
            self._not_due.append(command)
        return command is not None

    def _carry_out(self, engine: "Engine", command: _Command) -> bool:
        """False: its time has not come."""
        if command.is_due is not None and command.reply.cancelled():
            return True
        try:
            if command.is_due is not None and engine.has_work and not command.is_due(engine):
                return False
            result = command.run(engine)
        except DycokeError as error:
            # Its traceback would hold the sequence, and its frames, until garbage is looked for.
            self._post(_reject, command.reply, error.with_traceback(None))
        except Exception as error:
            self._post(_reject, command.reply, error)
        else:
            self._post(_resolve, command.reply, result)
        return True

    def _add(self, engine: "Engine", sequence: Sequence) -> str:
        prefix_key = engine.add(sequence)
        self._stages.watch(sequence)
        return prefix_key

    def _give_frames(
        self, engine: "Engine", sequence_id: str, frames: "npt.NDArray[np.uint8]"
    ) -> None:
        engine.give_frames(sequence_id, frames)
        self._waiting_for_frames = engine.waiting_for_frames

    def _abort(self, engine: "Engine", sequence_id: str) -> bool:
        self._stages.forget([sequence_id])
        had_it = engine.abort(sequence_id)
        self._report(engine, [])
        return had_it

    def _report(self, engine: "Engine", tokens: list[TokenEvent]) -> None:
        before, self._waiting_for_frames = self._waiting_for_frames, engine.waiting_for_frames
        wants_frames = tuple(name for name in self._waiting_for_frames if name not in before)
        update = Update(tokens, self._stages.changes(), engine.stats(), wants_frames)
        self._is_taken.wait(MAX_LAG_S)
        self._is_taken.clear()
        self._post(self._hand_over, update)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(call, *args)

    # --- on the event loop again ---

    def _hand_over(self, update: Update) -> None:
        self._is_taken.set()
        try:
            self._on_update(update)
        except Exception as error:  # the events of a callback that only logs would not be missed
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
                _reject(
                    command.reply,
                    EngineError("the worker's engine has stopped: post the request again"),
                )
        if None in commands:
            self._inbox.put(None)


class _StageWatch:
    """Progress of sequences before their first token; reports significant changes.

    Progress never goes back: a preempted sequence reports nothing until it is further than before.
    """

    def __init__(self) -> None:
        self._sequences: dict[str, Sequence] = {}
        self._told: dict[str, tuple[int, int]] = {}

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
                here = (_STAGES.index(stage), int(progress / PROGRESS_STEP))
                if here > self._told.get(sequence_id, (-1, 0)):
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
    """Marks an outcome as seen if no caller waits for it."""
    if not future.cancelled():
        future.exception()
