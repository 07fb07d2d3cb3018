"""Decides which requests get in: their model must have a live worker, and its queue a free place.

If the queue is full, the request is refused at its headers, without reading the body. A place is
taken, by lease, when the request is complete: a client that is still sending holds none.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from app.errors import ModelNotFoundError, NoWorkerError, StoreUnavailableError
from app.keys.limits import KeyLimits
from app.messages import ModelCard
from app.store.job_queue import JobQueue
from app.store.worker_registry import WorkerRegistry
from app.video_store import VideoLease
from dycoke_core.errors import InvalidRequestError

MAX_RENEW_S = 1.0  # within this time a job that was ended elsewhere stops reading here


async def served_models(registry: WorkerRegistry) -> dict[str, ModelCard]:
    """One card for each model that a live worker serves, by name.

    Raises:
        NoWorkerError: there is none.
    """
    return _by_model(await registry.cards())


async def admit(
    queue: JobQueue, *, max_jobs: int, owner: str, limits: KeyLimits, key_hash: str
) -> dict[str, ModelCard]:
    """What is served, as `served_models` says, where there is room just now, in the queue and
    within the owner's limits.

    Raises:
        NoWorkerError
        QueueFullError
        KeyLimitError
    """
    cards = await queue.admit(max_jobs=max_jobs, owner=owner, limits=limits, key_hash=key_hash)
    return _by_model(sorted(cards, key=lambda card: card.worker_id))


def choose_model(models: dict[str, ModelCard], name: str | None) -> ModelCard:
    """Returns the card of the model that a request is for.

    Raises:
        ModelNotFoundError
        InvalidRequestError: none was named and several are served.
    """
    if name is not None:
        if name not in models:
            raise ModelNotFoundError(
                f"no worker serves the model in 'model'; served: {', '.join(models)}"
            )
        return models[name]
    if len(models) > 1:
        raise InvalidRequestError(f"name one of the models in 'model': {', '.join(models)}")
    return next(iter(models.values()))


def _by_model(cards: Sequence[ModelCard]) -> dict[str, ModelCard]:
    """One card for each model, by its name: that of the first worker."""
    if not cards:
        raise NoWorkerError("no worker is ready to answer: one may be starting, so try again")
    return dict(sorted({card.model: card for card in reversed(cards)}.items()))


class Place:
    """A place in a model's queue: reserved, and renewed in the background until it is given up, or
    the job is in the queue and holds the place by itself.
    """

    def __init__(self, queue: JobQueue, model: str, job_id: str, *, lease_s: float) -> None:
        self.model = model
        self.job_id = job_id
        self._queue = queue
        self._lease_s = lease_s
        self._on_lost: Callable[[], None] | None = None
        # Most places are given up before they are renewed, so the task starts only then.
        self._renewal: asyncio.TimerHandle | None = None
        self._renewing: asyncio.Task[None] | None = None

    @classmethod
    def held(cls, queue: JobQueue, model: str, job_id: str, *, lease_s: float) -> "Place":
        """A place that has been taken already."""
        place = cls(queue, model, job_id, lease_s=lease_s)
        place._renewal = asyncio.get_running_loop().call_later(place._period_s, place._begin)
        return place

    @classmethod
    async def reserve(
        cls,
        queue: JobQueue,
        model: str,
        job_id: str,
        *,
        owner: str,
        num_places: int,
        max_jobs: int,
        lease_s: float,
    ) -> "Place":
        """Args: num_places: how many the job takes. Raises: QueueFullError."""
        await queue.reserve(
            model,
            job_id,
            max_jobs=max_jobs,
            lease_s=lease_s,
            owner=owner,
            num_places=num_places,
        )
        return cls.held(queue, model, job_id, lease_s=lease_s)

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Calls back when the lease is lost or the job has been ended by somebody else."""
        self._on_lost = callback

    async def stop_renewing(self) -> None:
        """Ends the lease: the job is in the queue, has ended, or the place is given up."""
        if self._renewal is not None:
            self._renewal.cancel()
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
            self._renewing = None

    async def release(self) -> None:
        """Gives the place up. If Redis does not answer, the lease runs out by itself."""
        await self.stop_renewing()
        with suppress(StoreUnavailableError):
            await self._queue.release(self.model, self.job_id)

    async def abandon(self) -> None:
        """Ends the lease now, so that another API may continue the job."""
        await self.stop_renewing()
        with suppress(StoreUnavailableError):
            await self._queue.renew_place(self.model, self.job_id, lease_s=0.0)

    @property
    def _period_s(self) -> float:
        return min(self._lease_s / 3, MAX_RENEW_S)

    def _begin(self) -> None:
        self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        while True:
            with suppress(StoreUnavailableError):
                if not await self._queue.renew_place(
                    self.model, self.job_id, lease_s=self._lease_s
                ):
                    break
            await asyncio.sleep(self._period_s)
        if self._on_lost is not None:
            self._on_lost()


class Admitted:
    """A complete request, and what it holds until its frames are being read: its video,
    and then a place in the queue. Both are given back when the block is left, unless they have been
    handed over.
    """

    def __init__(self) -> None:
        self._place: Place | None = None
        self._video: VideoLease | None = None  # stays None for a conversation without a video

    @property
    def job_id(self) -> str:
        return self._held_place.job_id

    def hold(self, video: VideoLease | None) -> None:
        self._video = video

    def take(self, place: Place) -> None:
        self._place = place

    async def forsake(self) -> None:
        """Stops renewing without giving the place up: the job owns it, or may own it."""
        if self._place is not None:
            await self._place.stop_renewing()
            self._place = None

    def hand_over(self) -> Place:
        """Passes on the place and the video; the caller must give both back."""
        place = self._held_place
        self._place = self._video = None
        return place

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._video is not None:
            self._video.release()
        if self._place is not None:
            await self._place.release()

    @property
    def _held_place(self) -> Place:
        assert self._place is not None, "no place yet, or it is handed over"
        return self._place
