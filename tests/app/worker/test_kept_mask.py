"""`kept_mask` in a worker: what it stores, and what the receipt says."""

import asyncio
import base64

from app.messages import DoneEvent
from app.settings import Settings
from app.store.kept_sets import KeptSets
from dycoke_core.kept_sets import KeptHistory
from tests.integration.kept import HISTORY_OF_TOKENS, history
from tests.integration.workers import Client, running


def bits(text: str | None) -> str:
    assert text is not None
    (byte,) = base64.b64decode(text)
    return f"{byte:08b}"


async def test_the_worker_stores_what_was_kept_before_it_ends_the_job(
    settings: Settings, client: Client, sets: KeptSets
) -> None:
    async with running(settings):
        asked = await client.ask("why?", max_tokens=HISTORY_OF_TOKENS, kept_mask=True)
        not_asked = await client.ask("why?", max_tokens=HISTORY_OF_TOKENS)
        done = [(await client.events(job_id))[-1] for job_id in (asked, not_asked)]
    assert all(isinstance(event, DoneEvent) for event in done)
    blob = await sets.get(asked)
    assert blob is not None and KeptHistory.decode(blob) == history()
    assert await sets.get(not_asked) is None
    mask, none = (event.kept_mask for event in done if isinstance(event, DoneEvent))
    assert none is None and mask is not None
    assert (mask.units, mask.tokens_per_unit, mask.rows, mask.columns) == (1, 4, 2, 2)
    assert bits(mask.stage1) == "11010000" and bits(mask.stage2) == "01010000"


async def test_an_answer_that_is_resumed_has_the_sets_of_all_its_tokens(
    settings: Settings, client: Client, sets: KeptSets
) -> None:
    async with running(settings, "worker-a") as first:
        job_id = await client.ask("sleep:0.2 why?", max_tokens=HISTORY_OF_TOKENS, kept_mask=True)
        await client.wait_for_token(job_id, 1)
        first.task.cancel()
        await asyncio.gather(first.task, return_exceptions=True)
    async with running(settings, "worker-b"):
        done = (await client.events(job_id))[-1]
    assert isinstance(done, DoneEvent) and done.attempts == 2
    blob = await sets.get(job_id)
    assert blob is not None and KeptHistory.decode(blob) == history()
