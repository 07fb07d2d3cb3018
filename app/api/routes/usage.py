"""How much a key has used the service and, for administrators, how much every key has."""

from datetime import date, timedelta
from typing import Annotated, Self

from fastapi import APIRouter, Query
from pydantic import BaseModel

from app.api.context import AdminDep, Api, ApiDep, PrincipalDep
from app.api.openapi import PROBLEMS
from app.keys.entries import Principal
from app.store.usage import USAGE_DAYS, today

EPOCH = date(1970, 1, 1)

router = APIRouter(tags=["usage"], responses=PROBLEMS)

DaysQuery = Annotated[int, Query(ge=1, le=USAGE_DAYS, description="The last so many, with today.")]


class Usage(BaseModel):
    """Of jobs that have ended, and of uploads. Tokens and frames are of jobs that are done."""

    jobs: int = 0
    jobs_done: int = 0
    jobs_error: int = 0
    jobs_cancelled: int = 0
    frames: int = 0
    visual_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uploads: int = 0
    upload_bytes: int = 0

    def plus(self, other: Self) -> "Usage":
        names = Usage.model_fields
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in names})


class UsageOfDay(Usage):
    date: date


class UsageOfKey(BaseModel):
    key: str  # its name
    total: Usage
    days: list[UsageOfDay]  # UTC; those on which there was any


class UsageList(BaseModel):
    data: list[UsageOfKey]


@router.get("/v1/usage", summary="What this key took of the service")
async def get_usage(api: ApiDep, principal: PrincipalDep, days: DaysQuery = 31) -> UsageOfKey:
    return await _usage(api, principal, days)


@router.get("/v1/usage/keys", summary="What every key took of the service")
async def list_usage(api: ApiDep, _: AdminDep, days: DaysQuery = 31) -> UsageList:
    """Wants a key of the scope `admin`. Revoked keys are among them."""
    return UsageList(data=[await _usage(api, holder, days) for holder in api.keys.holders])


async def _usage(api: Api, principal: Principal, num_days: int) -> UsageOfKey:
    last = today()
    numbers = range(last - num_days + 1, last + 1)
    counted = await api.usage.read(principal.owner, numbers)
    days = [
        UsageOfDay.model_validate({"date": EPOCH + timedelta(days=number), **counts})
        for number, counts in zip(numbers, counted, strict=True)
        if counts
    ]
    total = Usage()
    for day in days:
        total = total.plus(day)
    return UsageOfKey(key=principal.name, total=total, days=days)
