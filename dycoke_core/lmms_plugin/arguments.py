"""What `--model_args` may say, and what a task's generation settings mean to the engine.

Knows nothing of lmms-eval.
"""

from collections.abc import Mapping
from typing import Any

from dycoke_core.config import DEFAULT_POLICY, CompressionConfig
from dycoke_core.errors import InvalidRequestError
from dycoke_core.sequence import SamplingParams

DEFAULT_MAX_TOKENS = 1024  # lmms-eval's own, for tasks that name none

_PREFIX = "dycoke_"


def compression_of(*, dycoke: bool, policy: str | None, **settings: Any) -> CompressionConfig:
    """The compression that the arguments ask for.

    Args:
        dycoke: the released code's switch; off: full tokens.
        policy: any of the service's by name, instead of the switch.
        settings: `dycoke_k`, `dycoke_l`, ...: a parameter of the policy after the prefix.

    Raises:
        InvalidRequestError: unknown names, or values outside their ranges.
    """
    unknown = [name for name in settings if not name.startswith(_PREFIX)]
    if unknown:
        raise InvalidRequestError(
            f"the model takes no argument '{unknown[0]}'; "
            f"the policy's parameters begin with '{_PREFIX}'"
        )
    name = policy or (DEFAULT_POLICY if dycoke else "full")
    parameters = {key.removeprefix(_PREFIX): value for key, value in settings.items()}
    if name == "full" and not policy:
        parameters = {}  # a command line that only switches DyCoke off
    return CompressionConfig.parse({"policy": name, **parameters})


def sampling_of(generation: Mapping[str, Any], *, seed: int) -> SamplingParams:
    """A task's generation settings; greedy unless they ask for sampling at a temperature.

    Raises:
        InvalidRequestError: beam search, or values outside their ranges.
    """
    if generation.get("num_beams", 1) not in (1, None):
        raise InvalidRequestError("num_beams must be 1: beam search is not supported")
    until = generation.get("until") or ()
    temperature = generation.get("temperature") or 0.0
    is_sampled = generation.get("do_sample", temperature > 0) and temperature > 0
    return SamplingParams(
        max_tokens=int(generation.get("max_new_tokens") or DEFAULT_MAX_TOKENS),
        temperature=float(temperature) if is_sampled else 0.0,
        top_p=float(generation.get("top_p") or 1.0) if is_sampled else 1.0,
        seed=seed,
        stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
    )
