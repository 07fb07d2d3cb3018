"""Counts what a step would launch on a GPU, and refuses what would make the host wait; on a CPU.

    with LaunchCounter() as counter:
        engine = Engine(...)                  # from here on the origin of memory is recorded
        ...
        with counter.counting() as launches:
            engine.step()
    launches.total

On a CPU device and host memory are the same, so the counter distinguishes them by where a tensor
comes from, as it would on a GPU. Host memory: `torch.empty(n)` without a `device`, and whatever
comes from numpy and Python lists. Device memory: `.to(device)` of host memory, everything computed
from device memory, and everything that existed before the counter.

Counted as a launch: every ATen operation on device memory except views and bare allocations, copies
included, and every Triton kernel. Fused attention counts once. What the kernels' interpreter does
with torch is not counted.

Refused with HostWait, while counting:
- reading device memory: `item`, `tolist`, `numpy`, `bool`, `int`, `cpu()`, `to("cpu")`;
- results of unknown size: `nonzero`, boolean masks, `masked_select`, `unique`, `bincount`,
  `repeat_interleave` without an output size, `equal`;
- copies between host and device without `non_blocking=True`; `torch.tensor(..., device=...)` and
  indexing by a list, which copy from memory that is not pinned.

Not detected: whether memory is pinned; waits for events, streams and the whole device, which mean
nothing on a CPU; waits inside libraries; an upload that the code skips on a CPU, which counts as
one launch where the host's tensor first meets the device's; `.to(torch.device("cpu"))`, which is
taken for the model's device.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FACTORIES = {
    *("empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand", "randn", "randint"),
    *("randperm", "tensor", "as_tensor", "scalar_tensor", "empty_strided", "frombuffer"),
}
_ALLOCATIONS = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"),
    *("_unsafe_view", "set_", "resize_", "is_pinned", "pin_memory", "_pin_memory"),
}
_FUSED = {"scaled_dot_product_attention", "_fused_rms_norm"}
_WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}
_HOST_READS = {"tolist", "numpy", "__array__", "cpu"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class HostWait(BaseException):
    """The call makes the host wait for the device. Not an Exception: no engine may survive it."""


@dataclass(slots=True)
class Launches:
    operations: Counter[str] = field(default_factory=Counter)  # ATen's names; "upload"
    kernels: Counter[str] = field(default_factory=Counter)  # Triton's
    waits: Counter[str] = field(default_factory=Counter)  # if they are not refused

    @property
    def total(self) -> int:
        return self.operations.total() + self.kernels.total()

    def as_dict(self) -> dict[str, Any]:
        return {
            "total": self.total,
            "kernels": dict(self.kernels.most_common()),
            "operations": dict(self.operations.most_common()),
            "waits": dict(self.waits.most_common()),
        }


class LaunchCounter:
    def __init__(self) -> None:
        self._memory = _Memory()
        self._operations = _Operations(self._memory)
        self._calls = _Calls(self._memory, self._operations)
        self._modes = ExitStack()

    def __enter__(self) -> "LaunchCounter":
        self._modes.enter_context(self._operations)
        self._modes.enter_context(self._calls)
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()

    def uncounted(self) -> AbstractContextManager[None]:
        """Inside the block nothing is counted, refused or recorded."""
        return self._operations.uncounted()

    @contextmanager
    def counting(self, *, refuse_waits: bool = True) -> Iterator[Launches]:
        """Counts until the block ends.

        Raises:
            HostWait: from any call inside the block; with refuse_waits=False waits are counted.
        """
        launches = self._operations.launches = Launches()
        self._operations.refuses_waits = refuse_waits
        try:
            with _counting_kernels() as kernels:
                yield launches
            launches.kernels = kernels
        finally:
            self._operations.launches = None


def _counting_kernels() -> Any:
    """A context with a Counter of Triton kernels; always empty without Triton."""
    if find_spec("triton") is None or find_spec("dycoke_core.gpu_kernels") is None:
        return nullcontext(Counter())
    from dycoke_core.gpu_kernels.launch import counting_launches

    return counting_launches()


class _Memory:
    """Which storages are host memory. A weak reference keeps a storage's identity from reuse."""

    def __init__(self) -> None:
        self._host: dict[int, StorageWeakRef] = {}
        self.is_making_host = False  # inside a factory without a device

    def is_host(self, tensor: Tensor) -> bool:
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._host

    def add(self, value: Any) -> None:
        for tensor in _tensors(value):
            if (storage := _storage(tensor)) is not None:
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._host[storage._cdata] = reference

    def discard(self, tensor: Tensor) -> None:
        if (storage := _storage(tensor)) is not None:
            self._host.pop(storage._cdata, None)


class _Calls(TorchFunctionMode):
    """Sees what operations do not show: an explicit `device`, and reads through C."""

    def __init__(self, memory: _Memory, operations: "_Operations") -> None:
        super().__init__()
        self._memory = memory
        self._operations = operations

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_in_interpreter():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _FACTORIES and not (args and isinstance(args[0], Tensor)):
            return self._make(func, name, args, kwargs)
        if args and isinstance(args[0], Tensor):
            return self._call_on(args[0], func, name, args, kwargs)
        return func(*args, **kwargs)

    def _make(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_host = kwargs.get("device") is None
        if name in ("tensor", "as_tensor") and not is_host:
            self._operations.refuse(f"torch.{name}(..., device=...)")
        outer, self._memory.is_making_host = self._memory.is_making_host, is_host
        try:
            made = func(*args, **kwargs)
        finally:
            self._memory.is_making_host = outer
        if is_host:
            self._memory.add(made)
        else:
            self._memory.discard(made)
        return made

    def _call_on(
        self, tensor: Tensor, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        is_host = self._memory.is_host(tensor)
        if name == "to" and (target := _target(args, kwargs)) is not None:
            return self._move(tensor, target, func, args, kwargs)
        if not is_host and name in _HOST_READS:
            self._operations.refuse(f"Tensor.{name}")
        if not is_host and name == "new_tensor":
            self._operations.refuse("Tensor.new_tensor")
        if not is_host and name in ("__getitem__", "__setitem__") and _has_list(args[1]):
            self._operations.refuse("indexing by a list")
        return func(*args, **kwargs)

    def _move(
        self, tensor: Tensor, target: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """`Tensor.to`, with new memory where a GPU would allocate some."""
        was_host = self._memory.is_host(tensor)
        becomes_host = (
            self._memory.is_host(target) if isinstance(target, Tensor) else target == "cpu"
        )
        moved: Tensor = func(*args, **kwargs)
        if was_host == becomes_host:
            return moved
        self._operations.cross("Tensor.to", bool(kwargs.get("non_blocking", False)))
        with self._operations.uncounted():
            moved = moved.clone()
        if becomes_host:
            self._memory.add(moved)
        else:
            self._memory.discard(moved)
        return moved


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, memory: _Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: Launches | None = None  # set while counting
        self.refuses_waits = True
        self._memory = memory
        self._is_uncounted = False

    def refuse(self, what: str) -> None:
        if self.launches is None:
            return
        if self.refuses_waits:
            raise HostWait(f"{what} waits for the device")
        self.launches.waits[what] += 1

    def cross(self, what: str, is_non_blocking: bool) -> None:
        """Counts a copy between host and device."""
        if not is_non_blocking:
            self.refuse(f"{what} without non_blocking=True")
        self._count("upload" if what == "upload" else "copy_")

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        outer, self._is_uncounted = self._is_uncounted, True
        try:
            yield
        finally:
            self._is_uncounted = outer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        if self._is_uncounted or _is_in_interpreter():
            return func(*args, **kwargs)
        if name not in _FUSED:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = _tensors((args, kwargs))
        host = [tensor for tensor in tensors if self._memory.is_host(tensor)]
        is_host_work = len(host) == len(tensors) if tensors else self._memory.is_making_host
        if name == "lift_fresh" or is_host_work:
            result = func(*args, **kwargs)
            self._memory.add(result)
            return result
        self._check(name, func, args, kwargs)
        for tensor in host if name != "copy_" else ():
            self._upload(tensor)
        if name == "copy_" and any(tensor.dim() for tensor in host):
            self.cross("copy_", bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        elif not func.is_view and name not in _ALLOCATIONS:
            self._count(name)
        return func(*args, **kwargs)

    def _check(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in _WAITS:
            self.refuse(name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.refuse("repeat_interleave without output_size")
        if name in _INDEXED and any(
            t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1])
        ):
            self.refuse(f"{name} by a mask")

    def _upload(self, tensor: Tensor) -> None:
        """Counts an upload. A number travels with a launch; anything larger needs a copy first."""
        if tensor.dim():
            self.cross("upload", is_non_blocking=True)
            self._memory.discard(tensor)

    def _count(self, name: str) -> None:
        if self.launches is not None:
            self.launches.operations[name] += 1


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # opaque layouts have none
        return None


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The device or tensor that `Tensor.to` was given; None if it only changes the dtype."""
    given = [*args[1:2], kwargs.get("device"), kwargs.get("other")]
    wanted: tuple[type, ...] = (str, torch.device, Tensor)
    return next((value for value in given if isinstance(value, wanted)), None)


def _has_list(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list) or type(part).__module__ == "numpy" for part in parts)


def _is_in_interpreter() -> bool:
    """Whether Triton's interpreter is on the stack."""
    frame = sys._getframe(1)
    caller: Any = frame
    while caller is not None:
        if caller.f_globals.get("__name__", "").startswith("triton."):
            return True
        caller = caller.f_back
    return False
