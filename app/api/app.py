"""The API as an ASGI application: what it is made of, and its life from start to end."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from app.api.answer.answers import Answers
from app.api.answer.frame_images import FrameImages
from app.api.answer.jobs import Jobs
from app.api.answer.observer import Followers
from app.api.auth import ApiKeys
from app.api.compressions import Compressions
from app.api.connection.bodies import BodyGuard, BodySlots
from app.api.connection.browsers import BrowserGuard
from app.api.connection.drain import Drain
from app.api.connection.lingering import LingeringClose
from app.api.connection.streams import StreamSlots
from app.api.context import Api
from app.api.errors import LastErrors, install_error_handlers
from app.api.openai.errors import OpenAIErrors
from app.api.openai.fetching import MediaFetcher
from app.api.openai.intake import CompletionIntake
from app.api.openapi import install_openapi
from app.api.page.assets import docs_assets, page_assets
from app.api.post.cancelling import Cancellations
from app.api.post.chat_intake import ChatIntake
from app.api.post.fair_budget import FairBudget
from app.api.post.orphans import Orphans
from app.api.post.reader_slots import ReaderSlots
from app.api.post.reading import FrameReading
from app.api.post.second_try import SecondTryReaders
from app.api.post.submissions import Submissions
from app.api.post.uploads import Uploads
from app.api.routes import (
    chat,
    completions,
    docs,
    files,
    health,
    jobs,
    links,
    models,
    page,
    usage,
    videos,
)
from app.api.signed_links import SignedLinks
from app.api.upkeep.janitor import Janitor
from app.api.upkeep.metrics_page import MetricsPage
from app.keys.access import check_open_door, limits_of
from app.keys.file import KeyFile, KeyFileError
from app.metrics import ApiMetrics
from app.process_table import ProcessRow, ProcessTable
from app.settings import Settings
from app.store import event_reader
from app.store.client import connect
from app.store.event_log import EventLog
from app.store.event_reader import EventReader
from app.store.forgotten_videos import ForgottenVideos
from app.store.frame_store import FrameStore
from app.store.job_queue import JobQueue
from app.store.kept_sets import KeptSets
from app.store.keys import RedisKeys
from app.store.link_secret import LinkSecret
from app.store.usage import UsageLog
from app.store.video_aliases import VideoAliases
from app.store.worker_registry import WorkerRegistry
from app.tracing import Tracing, tracing_from_environment
from app.video_store import VideoStore
from dycoke_core.errors import SandboxUnavailableError
from dycoke_core.video import FrameReaders, ReadLimits
from dycoke_core.video.sandbox import has_random_layout

logger = logging.getLogger(__name__)

MAX_FOLLOWERS = 128
STORE_CONNECTIONS = 64
LARGEST_UPLOADS = 8  # uploads of the largest size that fit at a time, unless set
START_TRIES = 3  # of the frame readers
CORS_REQUEST_HEADERS = [
    *("Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "traceparent"),
    # OpenAI's client sends these from a browser, too.
    *(
        f"X-Stainless-{name}"
        for name in (
            *("Arch", "Helper-Method", "Lang", "OS", "Package-Version", "Retry-Count"),
            *("Runtime", "Runtime-Version", "Timeout"),
        )
    ),
]
CORS_RESPONSE_HEADERS = [
    *("X-Job-Id", "X-Request-Id", "X-Should-Retry", "Retry-After", "RateLimit", "RateLimit-Policy"),
]


class ReadersDoNotStartError(Exception):
    """The frame readers end as soon as they are started, for no known reason."""


def create_app(
    settings: Settings, *, row: ProcessRow | None = None, readers: FrameReaders | None = None
) -> FastAPI:
    """Builds the API and starts its frame readers; it connects when a server starts it.

    Args:
        row: this process's row, if it is one of several on a port.
        readers: used instead of sandboxed children of its own.

    Raises:
        ValueError: a setting that only the API can check is wrong.
        SandboxUnavailableError: this system cannot confine the readers.
        ReadersDoNotStartError
    """
    if settings.redis_url is None:
        raise ValueError(
            "DYCOKE_REDIS_URL is not set: name the Redis that the workers use, or run "
            "'python -m app serve', which brings its own"
        )
    redis_url = settings.redis_url
    compressions = Compressions.of(settings)
    keys = _api_keys(settings)
    metrics = ApiMetrics(_registry(), names_keys=not settings.public_metrics)
    metrics.set_capacity(queued_jobs=settings.max_queued_jobs, streams=settings.max_streams)
    own_table = ProcessTable.create(1) if row is None else None
    row = own_table.take_row(0) if own_table else row
    assert row is not None
    drain = Drain()
    tracing = tracing_from_environment("api")
    if readers is None:
        readers = _start_readers(settings)
    metrics.watch_readers(lambda: readers.kills, lambda: readers.num_exceptions)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if own_table is not None:
                stack.callback(own_table.close)
            app.state.api = await _start(
                settings,
                redis_url,
                compressions,
                keys,
                metrics,
                row,
                drain,
                readers,
                tracing,
                stack,
            )
            yield

    app = FastAPI(
        title="DyCoke Serve",
        summary="Answers questions about videos, with DyCoke token compression.",
        version="1",
        lifespan=lifespan,
        openapi_url=None,  # see `app.api.routes.docs`
        redirect_slashes=False,  # redirects would use the Host header
    )
    app.state.row = row
    app.state.drain = drain
    install_error_handlers(app, metrics.count_rejection)
    install_openapi(app)
    for module in (
        *(chat, completions, videos, links, files, jobs, models, usage),
        *(docs, page, health),
    ):
        app.include_router(module.router)
    app.mount("/page", page_assets())
    app.mount("/docs/assets", docs_assets())
    app.add_middleware(
        BodyGuard,
        slots=BodySlots(
            row, max_bodies=settings.max_uploads, max_per_client=settings.max_uploads_per_client
        ),
        owner_of=keys.owner_of,
        count_rejection=metrics.count_rejection,
    )
    app.add_middleware(
        BrowserGuard,
        allowed_hosts=settings.allowed_hosts,
        allowed_origins=settings.allowed_origins,
        has_keys=lambda: keys.has_any,
        count_rejection=metrics.count_rejection,
    )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=CORS_REQUEST_HEADERS,
            expose_headers=CORS_RESPONSE_HEADERS,
        )
    app.add_middleware(LastErrors, is_draining=lambda: drain.is_draining)
    app.add_middleware(OpenAIErrors)
    app.add_middleware(LingeringClose)
    return app


async def _start(
    settings: Settings,
    redis_url: str,
    compressions: Compressions,
    api_keys: ApiKeys,
    metrics: ApiMetrics,
    row: ProcessRow,
    drain: Drain,
    readers: FrameReaders,
    tracing: Tracing,
    stack: AsyncExitStack,
) -> Api:
    """Builds what the routes work with; `stack` closes it in reverse order."""
    stack.push_async_callback(asyncio.to_thread, tracing.close)
    keys = RedisKeys(settings.redis_prefix)
    redis = connect(redis_url, max_connections=STORE_CONNECTIONS)
    stack.push_async_callback(redis.aclose)
    log_redis = connect(redis_url, max_connections=event_reader.CONNECTIONS)
    stack.push_async_callback(log_redis.aclose)
    reader = EventReader(log_redis, keys)
    stack.push_async_callback(_stop, asyncio.create_task(reader.run()))

    stack.push_async_callback(readers.aclose)
    slots = ReaderSlots(row, settings.max_frame_readers)
    second_try = SecondTryReaders(readers, slots)
    videos = VideoStore(
        settings.data_dir / "videos",
        max_bytes=settings.max_video_store_bytes,
        max_videos=settings.max_stored_videos,
        max_upload_bytes=settings.max_upload_bytes,
        max_incoming_bytes=(
            settings.max_incoming_bytes or LARGEST_UPLOADS * settings.max_upload_bytes
        ),
        row=row,
    )
    await videos.open()
    queue = JobQueue(redis, keys, result_ttl_s=settings.result_ttl_s)
    frames = FrameStore(redis, keys, max_bytes=settings.max_frame_store_bytes)
    registry = WorkerRegistry(redis, keys)
    reading = FrameReading(
        queue,
        frames,
        second_try,
        metrics,
        tracing,
        max_held_bytes=settings.max_held_frame_bytes,
        patience_s=settings.lease_s,
    )
    stack.push_async_callback(reading.aclose)
    cancellations = Cancellations(queue, reading)
    stack.push_async_callback(cancellations.aclose)
    followers = Followers(MAX_FOLLOWERS)
    stack.push_async_callback(followers.aclose)
    orphans = Orphans(
        queue,
        videos,
        reading,
        drain,
        lease_s=settings.lease_s,
        read_timeout_s=settings.read_timeout_s,
    )
    metrics_page = MetricsPage(metrics.registry, row)
    await stack.enter_async_context(metrics_page.shown_to_siblings())
    stack.push_async_callback(_stop, asyncio.create_task(api_keys.run()))
    usage_log = UsageLog(redis, keys)
    uploads = Uploads(
        videos,
        second_try,
        ForgottenVideos(redis, keys),
        usage_log,
        drain,
        limits_of=partial(limits_of, settings=settings),
        are_caches_shared=settings.share_caches,
        timeout_s=settings.job_timeout_s,
    )
    janitor = Janitor(queue, registry, videos, uploads, orphans, api_keys, metrics)
    stack.push_async_callback(_stop, asyncio.create_task(janitor.run()))
    jobs = Jobs(queue, EventLog(redis, keys), reader, heartbeat_s=settings.heartbeat_s)
    return Api(
        keys=api_keys,
        links=SignedLinks(api_keys, LinkSecret(redis, keys)),
        public_docs=settings.public_docs,
        public_metrics=settings.public_metrics,
        drain=drain,
        streams=StreamSlots(settings.max_streams, row, metrics),
        registry=registry,
        videos=videos,
        listings=FairBudget(1),
        frame_images=FrameImages(frames),
        compressions=compressions,
        chat_intake=ChatIntake(settings, compressions, uploads),
        completion_intake=partial(
            CompletionIntake,
            settings,
            compressions,
            uploads,
            _media_fetcher(settings),
            VideoAliases(redis, keys),
        ),
        uploads=uploads,
        submissions=Submissions(
            settings,
            compressions,
            drain,
            queue,
            uploads,
            reading,
            cancellations,
            tracing,
            metrics,
        ),
        cancellations=cancellations,
        jobs=jobs,
        kept_sets=KeptSets(redis, keys),
        answers=Answers(jobs, drain, metrics, followers, cancellations),
        usage=usage_log,
        metrics=metrics,
        metrics_page=metrics_page,
        tracing=tracing,
    )


def _media_fetcher(settings: Settings) -> MediaFetcher:
    return MediaFetcher(
        settings.allowed_media_domains,
        settings.allowed_media_path,
        max_bytes=settings.max_upload_bytes,
    )


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _api_keys(settings: Settings) -> ApiKeys:
    """Raises ValueError: the keys cannot be read, or everybody would be let in."""
    try:
        keys = ApiKeys(settings.api_keys, KeyFile(settings.data_dir))
    except KeyFileError as error:
        raise ValueError(str(error)) from error
    check_open_door(settings, has_keys=keys.has_any)
    return keys


def _start_readers(settings: Settings) -> FrameReaders:
    """Tries again where a reader ended before it could say how far it is confined: then something
    else has ended it, and nothing is known of this system yet.
    """
    for tries_left in reversed(range(START_TRIES)):
        try:
            readers = FrameReaders(
                ReadLimits(timeout_s=settings.read_timeout_s),
                max_readers=settings.max_frame_readers,
                allow_unsandboxed=settings.allow_unsandboxed,
            )
            break
        except SandboxUnavailableError as error:
            if error.__cause__ is None:  # reported: the system lacks what the sandbox needs
                raise
            if not tries_left:
                raise ReadersDoNotStartError(error.message) from error
            logger.warning("a frame reader ended while it was started; trying again")
    level = logging.INFO if readers.sandbox.is_complete else logging.WARNING
    logger.log(level, "%s", readers.sandbox.describe())
    if not has_random_layout():
        logger.warning(
            "this system gives processes no random addresses: randomize_va_space is not 2"
        )
    return readers


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry
