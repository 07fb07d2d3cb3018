"""Counts the bytes of tensors that live at once, on any device."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Of what is allocated while it is entered; `peak` is the most that there was."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._num_bytes: dict[int, int] = {}  # by storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_storage(leaf)._cdata for leaf in _tensors((args, kwargs))} | {*self._num_bytes}
        for tensor in _tensors(result):
            storage = _storage(tensor)
            if storage._cdata not in known:
                self._num_bytes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._num_bytes.pop, storage._cdata, 0)
                known.add(storage._cdata)
        self.peak = max(self.peak, sum(self._num_bytes.values()))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
