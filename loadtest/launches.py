"""What one decode step launches on a device: kernels and operations, by batch, policy and videos.

    python -m loadtest.launches [--json] [--batches 1 16 64] [--layers 28] [--backend cuda|cpu]

Counted on a CPU, at toy widths, over all of `Engine.step`: attention, sampling, copies. A CUDA
graph replays the same kernels in one launch. A step that makes the host wait for the device fails;
see `loadtest.launch_counter` for what is counted and detected. With --json one JSON object on the
last line.

Triton's interpreter would take minutes for a step of 64 rows, so only the sampling kernels run, on
zeros; the others are only counted. Nothing on the device can change what the host launches, or the
host would have to wait for it.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any
from unittest import mock

if __name__ == "__main__":  # Triton reads the variable when imported
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"

import torch
from torch.overrides import TorchFunctionMode

from loadtest.gpu.sizes import DRY, TOY
from loadtest.gpu.workbench import BACKEND, Workbench
from loadtest.launch_counter import LaunchCounter, Launches

LAYERS = 28  # LLaVA-OneVision-7B's
BATCHES = (1, 16, 64)
_KV_BYTES = 2**18  # per sequence and layer, more than enough
PER_LAYER, FIXED = 12, 40  # at most, for any batch
POLICIES = ("full", "dycoke")


@dataclass(frozen=True, slots=True)
class Count:
    batch: int
    policy: str
    num_videos: int
    launches: Launches

    def as_dict(self) -> dict[str, Any]:
        named = {"batch": self.batch, "policy": self.policy, "num_videos": self.num_videos}
        return named | self.launches.as_dict()


def count_all(
    batches: Sequence[int], *, num_layers: int = LAYERS, backend: Mapping[str, Any] = BACKEND
) -> list[Count]:
    """Counts a step for each batch and policy, with one video per sequence and one for all."""
    counts = []
    for batch in batches:
        for num_videos in sorted({batch, 1}, reverse=True):
            for policy in POLICIES:
                counts.append(count_step(batch, policy, num_videos, num_layers, backend))
                print(_row(counts[-1]), flush=True)
    return counts


def count_step(
    batch: int,
    policy: str,
    num_videos: int,
    num_layers: int = LAYERS,
    backend: Mapping[str, Any] = BACKEND,
) -> Count:
    """Counts a step of a new engine in steady decode.

    Raises:
        HostWait: the step waits for the device; the CPU backend's may wait, and waits are counted.
    """
    sizes = replace(DRY, large=replace(TOY, num_layers=num_layers), wide_batch=batch, stagger=32)
    with torch.inference_mode(), LaunchCounter() as counter, _kernels_idle(counter):
        bench = Workbench.build(
            sizes.large,
            sizes,
            torch.device("cpu"),
            kv_bytes=batch * num_layers * _KV_BYTES,
            backend=backend,
        )
        is_cpu = bench.engine.backend_name == "cpu"
        with (
            bench.decoding(getattr(bench.policies, policy), batch, num_videos=num_videos),
            counter.counting(refuse_waits=not is_cpu) as launches,
        ):
            bench.engine.step()
    return Count(batch, policy, num_videos, launches)


@contextmanager
def _kernels_idle(counter: LaunchCounter) -> Iterator[None]:
    """Makes all kernels but the sampling ones do nothing; what they would write is zero."""
    if find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def run_sampling(executor: Any, *args: Any, **options: Any) -> None:
        if executor.fn.__module__.endswith("gpu_kernels.sampling"):
            run(executor, *args, **options)

    with mock.patch.object(GridExecutor, "__call__", run_sampling), _ZeroedMemory(counter):
        yield


class _ZeroedMemory(TorchFunctionMode):
    """Makes unwritten memory hold zeros."""

    def __init__(self, counter: LaunchCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("empty", "empty_like", "new_empty"):
            with self._counter.uncounted():
                made.zero_()
        return made


def _row(count: Count) -> str:
    videos = "one video" if count.num_videos == 1 < count.batch else "own videos"
    where = f"  batch {count.batch:3}, {videos:10}, {count.policy:6}"
    kernels, operations = count.launches.kernels.total(), count.launches.operations.total()
    counted = f"{count.launches.total:6} = {kernels} kernels + {operations} operations"
    waits = count.launches.waits.total()
    return f"{where}: {counted}" + (f", waits {waits} times" if waits else "")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="a JSON object on the last line")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--backend", choices=("cuda", "cpu"), help="default: cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bound = PER_LAYER * arguments.layers + FIXED
    print(f"launches of a decode step, {arguments.layers} layers; wanted: {bound} at most")
    backend = {"backend": arguments.backend} if arguments.backend else BACKEND
    counts = count_all(arguments.batches, num_layers=arguments.layers, backend=backend)
    is_met = all(count.launches.total <= bound for count in counts)
    print("within the bound" if is_met else "NOT within the bound")
    if arguments.json:
        rows = [count.as_dict() for count in counts]
        result = {"layers": arguments.layers, "bound": bound, "met": is_met, "steps": rows}
        print(json.dumps(result))
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
