"""Read once, ask many: videos' features and prefix KV, shared between sequences, cached by content.

A `Video` is the features of a video's units before stage I; a `Prefix` is the prompt up to the
question under one stage-I setting. Sequences hold (pin) what they use from admission to their end.
Entries without a holder stay until their bytes are needed, and are evicted least recently used
first. Unfinished work is dropped when its last holder leaves.

Does no scheduling and no model work.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(slots=True, eq=False)
class Video:
    """The features of one video's units. Each distinct unit is encoded once.

    Args:
        frames: uint8 [F, height, width, 3], those of the sequence that came first; dropped when
            encoded.
    """

    key: str
    frames: npt.NDArray[np.uint8] | None
    distinct: tuple[int, ...]  # units that differ from the one before
    sources: tuple[int, ...]  # each unit's place among the distinct ones
    num_bytes: int
    num_host_bytes: int = 0
    features: Tensor | None = None  # [distinct, N, features]
    num_encoded: int = 0  # distinct units whose features are done
    holders: int = 0
    video_name: str | None = None  # by which it is forgotten
    is_forgotten: bool = False

    @property
    def is_ready(self) -> bool:
        return self.num_encoded == len(self.distinct)

    @property
    def outlives_holders(self) -> bool:
        """Whether it is kept when nobody holds it."""
        return self.is_ready and not self.is_forgotten


@dataclass(slots=True, eq=False)
class Prefix:
    """One video's prompt prefix under one stage-I setting; a backend holds its keys and values."""

    key: str
    number: int  # by which the backend knows it
    num_tokens: int
    video: Video | None  # dropped when prefilled; none for a conversation without one
    num_bytes: int
    num_host_bytes: int = 0
    is_embedded: bool = False  # stage I is through: the backend has what is to be prefilled
    num_run: int = 0  # tokens that have been prefilled
    kept_per_unit: tuple[int, ...] = ()
    kept: Tensor | None = None  # int64 [V], of the units * N tokens, as they stand in the prompt
    holders: int = 0
    video_name: str | None = None  # by which it is forgotten
    is_forgotten: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether it is prefilled and has let go of its video."""
        return self.num_run == self.num_tokens and self.video is None

    @property
    def outlives_holders(self) -> bool:
        """Whether it is kept when nobody holds it."""
        return self.is_ready and not self.is_forgotten


@dataclass(slots=True)
class ByteBudget:
    """Bytes that several owners share. A reservation counts in full before it is allocated."""

    max_bytes: int
    used_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        return self.max_bytes - self.used_bytes


Item = TypeVar("Item", Video, Prefix)


class SharedPool(Generic[Item]):
    """Items by content under a budget, least recently used first.

    Args:
        host_budget: of what items keep in host memory instead.
        on_drop: called with each item that leaves.
    """

    def __init__(
        self,
        budget: ByteBudget,
        host_budget: ByteBudget | None = None,
        on_drop: Callable[[Item], None] = lambda item: None,
    ) -> None:
        self.budget = budget
        self.host_budget = host_budget or ByteBudget(0)
        self._on_drop: Callable[[Item], None] = on_drop
        self._items: OrderedDict[str, Item] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: str) -> bool:
        return key in self._items

    @property
    def idle_bytes(self) -> int:
        """Of items without a holder."""
        return sum(item.num_bytes for item in self._items.values() if item.holders == 0)

    def get(self, key: str) -> Item | None:
        """The item of this key, as it stands."""
        return self._items.get(key)

    def hold(self, key: str) -> Item | None:
        """The item of this key, pinned until `release`; None if there is none."""
        item = self._items.get(key)
        if item is not None:
            item.holders += 1
            self._items.move_to_end(key)
        return item

    def add(self, item: Item) -> None:
        """Adds a new item, held once. The caller has made room."""
        assert item.key not in self._items and item.num_bytes <= self.budget.free_bytes
        item.holders = 1
        self._items[item.key] = item
        self.budget.used_bytes += item.num_bytes

    def release(self, item: Item) -> None:
        item.holders -= 1
        self._items.move_to_end(item.key)
        if item.holders == 0 and not item.outlives_holders:
            self._drop(item)

    def forget(self, video_name: str) -> None:
        """Drops a video's items; held ones when their last holder releases them."""
        for item in [item for item in self._items.values() if item.video_name == video_name]:
            item.is_forgotten = True
            if item.holders == 0:
                self._drop(item)

    def move_to_host(self, item: Item, num_bytes: int, num_host_bytes: int) -> None:
        """Accounts for bytes of an item that now lie in host memory, where there is room."""
        self.budget.used_bytes -= num_bytes
        item.num_bytes -= num_bytes
        self.host_budget.used_bytes += num_host_bytes
        item.num_host_bytes += num_host_bytes

    def can_make_room(self, num_bytes: int) -> bool:
        """Whether this many bytes are free or could be, by evicting items without a holder."""
        return num_bytes <= self.budget.free_bytes + self.idle_bytes

    def make_room(self, num_bytes: int) -> None:
        """Evicts items without a holder until this many bytes are free. Check `can_make_room`
        before."""
        self._evict_until(lambda: num_bytes <= self.budget.free_bytes)

    def make_host_room(self, num_bytes: int) -> bool:
        """Like `make_room` for host memory; False, and nothing evicted, if it cannot be made."""
        idle_bytes = sum(i.num_host_bytes for i in self._items.values() if i.holders == 0)
        if num_bytes > self.host_budget.free_bytes + idle_bytes:
            return False
        self._evict_until(lambda: num_bytes <= self.host_budget.free_bytes, only_from_host=True)
        return True

    def clear(self) -> None:
        """Drops items without a holder."""
        self._evict_until(lambda: False)

    def evict_one(self) -> bool:
        """Drops the least recently used item without a holder; False: there is none."""
        num_before = len(self)
        self._evict_until(lambda: len(self) < num_before)
        return len(self) < num_before

    def _evict_until(self, is_enough: Callable[[], bool], *, only_from_host: bool = False) -> None:
        """With `only_from_host`, skips items without host memory."""
        idle = [item for item in self._items.values() if item.holders == 0]
        for item in idle:
            if is_enough():
                return
            if item.num_host_bytes or not only_from_host:
                self._drop(item)

    def _drop(self, item: Item) -> None:
        del self._items[item.key]
        self.budget.used_bytes -= item.num_bytes
        self.host_budget.used_bytes -= item.num_host_bytes
        self._on_drop(item)


def content_key(*parts: object) -> str:
    """A key of everything that changes a cached value."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
