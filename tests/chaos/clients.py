"""Clients that ask, read, resume, leave, retry and cancel, and write down what they saw.

What a client may meet: connections that break, refusals that invite it to ask again, answers that
pause. It continues until its answer has ended, at whichever API is up.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.chaos.ledger import JobEntry, Ledger, Question, View, check_receipt, sse_events

RETRY_S = 0.2
WHOLE_TIMEOUT_S = 90.0  # for an answer in one piece
REFUSALS = {
    429: {"queue_full"},
    503: {"no_worker", "shutting_down", "store_unavailable", "too_many_streams", "reader_lost"},
    408: {"upload_timeout"},
}
BROKEN = httpx.TransportError  # the server is gone, or so slow that this client leaves
LEFT = httpx.TimeoutException  # of these, what the server sees as a client that leaves
# Those whose connection may close without a cancel.
_STAYING = ("resume", "desert", "delete", "audience")
_LEAVING = ("resume", "desert", "delete", "abort")  # by themselves, before the end


class Unanswered(Exception):
    """The request was not accepted, or it is unknown whether it was."""


class Client:
    """Args:
    urls: of the APIs.
    clips: the videos' content; each is stored already, under the given id.
    must_end: set once everything must have ended.
    """

    def __init__(
        self,
        name: str,
        http: httpx.AsyncClient,
        urls: Sequence[str],
        clips: Sequence[tuple[bytes, str]],
        ledger: Ledger,
        must_end: asyncio.Event,
    ) -> None:
        self._name = name
        self._http = http
        self._urls = urls
        self._clips = clips
        self._ledger = ledger
        self._must_end = must_end

    async def ask_all(self, questions: Iterator[Question], is_over: asyncio.Event) -> None:
        """One question after another until the run is over."""
        while not is_over.is_set():
            await self.ask(next(questions))

    async def ask(self, question: Question) -> None:
        try:
            if question.manner == "whole":
                await self._ask_for_the_whole(question)
            elif question.manner == "retry":
                await self._ask_twice(question)
            else:
                await self._ask_and_read(question)
        except Unanswered:
            await asyncio.sleep(RETRY_S)

    async def read(self, entry: JobEntry, *, reader: str, view: View | None = None) -> View:
        """Reads an answer from where a view has come to, to its end."""
        view = view or View(entry, self._ledger, reader)
        rng = random.Random(f"{entry.job_id} {reader}")
        api = entry.question.api
        while view.final is None and not self._must_end.is_set():
            api = (api + 1) % len(self._urls)
            breaks_after = rng.randrange(1, 12) if entry.question.manner == "resume" else None
            try:
                if not await self._read_on(view, api, breaks_after):
                    return view
            except BROKEN:
                await asyncio.sleep(RETRY_S)
        return view

    async def _read_on(self, view: View, api: int, breaks_after: int | None) -> bool:
        """Reads on one connection. False where there is nothing left to read."""
        headers = {} if view.last_id is None else {"Last-Event-ID": view.last_id}
        self._ledger.num_resumes += view.last_id is not None
        job_id = view.entry.job_id
        url = f"{self._urls[api]}/v1/jobs/{job_id}/events"
        async with self._http.stream("GET", url, headers=headers) as reply:
            if reply.status_code == 204:
                self._ledger.blame(f"204 behind {view.last_id}, which is not the end", job_id)
                return False
            if reply.status_code != 200:
                code = await self._refusal(reply, view.entry)
                if code == "job_not_found":
                    return False
                await asyncio.sleep(RETRY_S)
                return True
            await self._follow(reply, view, breaks_after)
        return True

    async def _follow(self, reply: httpx.Response, view: View, stop_after: int | None) -> None:
        num_events = 0
        async for event in sse_events(reply):
            view.take(event)
            num_events += 1
            if view.final is not None or num_events == stop_after:
                return

    # --- asking ---

    async def _ask_and_read(self, question: Question) -> None:
        manner = question.manner
        async with self._post(question, question.api) as (entry, reply):
            view = View(entry, self._ledger, "poster")
            entry.may_be_cancelled = manner == "abort"
            try:
                stop_after = 1 + question.leaves_after if manner in _LEAVING else None
                await self._follow(reply, view, stop_after)
            except BROKEN as error:
                self._ledger.note(entry, f"the poster's connection broke: {error!r}")
                if isinstance(error, LEFT) and manner not in _STAYING:
                    entry.may_be_cancelled = True
        await self._go_on(entry, view)

    async def _go_on(self, entry: JobEntry, view: View) -> None:
        manner = entry.question.manner
        if view.final is not None:
            return
        self._ledger.note(entry, f"the poster has read {view.num_tokens} tokens; {manner}")
        if manner == "delete":
            await self._delete(entry)
        if manner == "audience":
            views = (self.read(entry, reader=f"reader {i}") for i in range(3))
            await asyncio.gather(*views)
        if manner == "abort":
            return  # the checks at the end read it
        await self.read(entry, reader="poster", view=view)

    async def _ask_for_the_whole(self, question: Question) -> None:
        api, has_left = question.api, False
        while not self._must_end.is_set():
            url = f"{self._urls[api]}/v1/video/chat"
            body = self._body(question, is_streamed=False)
            try:
                reply = await self._http.post(url, **body, timeout=WHOLE_TIMEOUT_S)
            except BROKEN:
                if not question.has_key:
                    raise Unanswered from None
                has_left = True
                api = 1 - api
                await asyncio.sleep(RETRY_S)
                continue
            await self._take_whole(question, reply, has_left=has_left)
            return

    async def _take_whole(
        self, question: Question, reply: httpx.Response, *, has_left: bool
    ) -> None:
        job_id = reply.headers.get("x-job-id")
        if job_id is None:
            await self._refusal(reply)
            raise Unanswered
        entry = self._ledger.accept(job_id, question)
        entry.may_be_cancelled = has_left
        if reply.status_code == 200:
            check_receipt(reply.json(), entry, self._ledger)
            return
        self._ledger.note(entry, f"the whole was refused: {reply.text}")
        await self.read(entry, reader="poster")

    async def _ask_twice(self, question: Question) -> None:
        """Leaves early, and posts the same again at the other API, with the same key, until one
        connection has brought the end.
        """
        api, has_left = question.api, False
        stop_after: int | None = 1 + question.leaves_after // 3
        while not self._must_end.is_set():
            try:
                async with self._post(question, api) as (entry, reply):
                    # One that a second post has found ends with no connection.
                    entry.may_be_cancelled = has_left and entry.num_posts == 1
                    view = View(entry, self._ledger, f"poster at {api}")
                    try:
                        await self._follow(reply, view, stop_after)
                    finally:
                        has_left = view.final is None
                        entry.may_be_cancelled |= has_left and entry.num_posts == 1
                if view.final is not None:
                    return
            except BROKEN:
                has_left = True
            except Unanswered as error:
                has_left |= error.__cause__ is not None  # no answer: it may have been accepted
                await asyncio.sleep(RETRY_S)
            api, stop_after = 1 - api, None

    @asynccontextmanager
    async def _post(
        self, question: Question, api: int
    ) -> AsyncIterator[tuple[JobEntry, httpx.Response]]:
        """Posts a question that is to be streamed.

        Raises:
            Unanswered
        """
        url = f"{self._urls[api]}/v1/video/chat"
        try:
            stream = self._http.stream("POST", url, **self._body(question, is_streamed=True))
            reply = await stream.__aenter__()
        except BROKEN as error:
            raise Unanswered from error
        try:
            if reply.status_code != 200:
                await self._refusal(reply)
                raise Unanswered
            entry = self._ledger.accept(reply.headers["x-job-id"], question)
            yield entry, reply
        finally:
            await reply.aclose()

    def _body(self, question: Question, *, is_streamed: bool) -> dict[str, Any]:
        content, video_id = self._clips[question.clip]
        fields = {
            "question": question.text,
            "max_tokens": question.max_tokens,
            "num_frames": question.num_frames,
            "start_s": question.start_s,
            "stream": is_streamed,
            "on_disconnect": "continue" if question.manner in _STAYING else "cancel",
        }
        headers = {"Idempotency-Key": question.text.replace(" ", "_")} if question.has_key else {}
        if not question.has_upload:
            return {"json": {**fields, "video_id": video_id}, "headers": headers}
        data = {name: str(value).lower() for name, value in fields.items()}
        data["question"] = question.text
        return {"data": data, "files": {"video": content}, "headers": headers}

    async def _delete(self, entry: JobEntry) -> None:
        entry.may_be_cancelled = True
        api = 1 - entry.question.api
        while not self._must_end.is_set():
            try:
                reply = await self._http.delete(f"{self._urls[api]}/v1/jobs/{entry.job_id}")
            except BROKEN:
                api = 1 - api
            else:
                if reply.status_code == 200:
                    self._ledger.note(entry, f"deleted: {reply.json()['state']}")
                    return
                await self._refusal(reply, entry)
            await asyncio.sleep(RETRY_S)

    async def _refusal(self, reply: httpx.Response, entry: JobEntry | None = None) -> str:
        """Counts a refusal and returns its code; one without a code of the service is a fault."""
        await reply.aread()
        kind = reply.headers.get("content-type", "")
        code = reply.json()["code"] if kind.startswith("application/problem+json") else ""
        self._ledger.count_refusal(code or str(reply.status_code))
        if code not in REFUSALS.get(reply.status_code, ()):
            where = f"{reply.request.method} {reply.request.url.path}"
            job_id = entry.job_id if entry is not None else None
            self._ledger.blame(f"{where}: {reply.status_code} {reply.text[:300]}", job_id)
        return code
