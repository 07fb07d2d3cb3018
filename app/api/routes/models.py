"""The models that live workers serve, and the ways to compress."""

import time
from collections import Counter
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from app.api.context import Api, ApiDep, PrincipalDep
from app.api.openapi import OPENAI_ERRORS
from app.errors import ModelNotFoundError
from app.messages import FrameLimits, FrameRate
from dycoke_core.auto import AUTO, AUTO_PARAMETERS
from dycoke_core.config import POLICY_PARAMETERS
from dycoke_core.model_frames import Resizing, Spread

router = APIRouter(tags=["models"], responses=OPENAI_ERRORS)

_STARTED_AT_S = int(time.time())


class ModelResource(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int  # Unix time at which this process started: a model has no other
    owned_by: str = "dycoke"
    root: str
    max_model_len: int  # as vLLM calls max_model_tokens
    num_workers: int
    image_size: int  # pixels, of square frames
    frame_limits: FrameLimits | None  # of frames that keep their shape; null: all are square
    frame_spread: Spread  # which frames of a clip are read
    frame_rate: FrameRate | None  # how many `fps` makes; null: length times rate, rounded down
    frame_resizing: Resizing  # how they come to their size
    tokens_per_frame: int  # of square ones: of `frames_per_unit` of them together
    frames_per_unit: int
    num_layers: int
    max_model_tokens: int


class CompressionPolicies(BaseModel):
    default: dict[str, Any]
    policies: dict[str, list[str]]  # the parameters that each takes


class ModelList(BaseModel):
    """The shape that OpenAI clients read, and more."""

    object: Literal["list"] = "list"
    data: list[ModelResource]
    compression: CompressionPolicies


@router.get("/v1/models", summary="The models that workers serve now")
async def list_models(api: ApiDep, _: PrincipalDep) -> ModelList:
    return ModelList(
        data=await _models(api),
        compression=CompressionPolicies(
            default=api.compressions.default.as_dict(),
            policies={
                **{name: list(taken) for name, taken in POLICY_PARAMETERS.items()},
                AUTO: list(AUTO_PARAMETERS),
            },
        ),
    )


@router.get("/v1/models/{model:path}", summary="One of them")
async def get_model(model: str, api: ApiDep, _: PrincipalDep) -> ModelResource:
    for resource in await _models(api):
        if resource.id == model:
            return resource
    raise ModelNotFoundError("no worker serves this model; GET /v1/models lists those served")


async def _models(api: Api) -> list[ModelResource]:
    cards = await api.registry.cards()
    num_workers = Counter(card.model for card in cards)
    by_model = {card.model: card for card in cards}
    return [
        ModelResource(
            id=model,
            created=_STARTED_AT_S,
            root=model,
            max_model_len=card.max_model_tokens,
            num_workers=num_workers[model],
            image_size=card.image_size,
            frame_limits=card.frame_limits,
            frame_spread=card.frame_spread,
            frame_rate=card.frame_rate,
            frame_resizing=card.frame_resizing,
            tokens_per_frame=card.tokens_per_frame,
            frames_per_unit=card.frames_per_unit,
            num_layers=card.num_layers,
            max_model_tokens=card.max_model_tokens,
        )
        for model, card in sorted(by_model.items())
    ]
