"""Who fits beside whom, in bytes, with prefixes that some share."""

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from dycoke_core.engine.backend import Backend
from dycoke_core.engine.prefix_cache import ByteBudget, Prefix, SharedPool, Video
from dycoke_core.engine.room import Room
from dycoke_core.engine.state import SequenceState

SEAT, PREFIX, FEATURES = 10, 30, 5


class Sizes:
    """A backend all of whose seats and prefixes are alike."""

    def seat_bytes(self, layout: Any) -> int:
        return SEAT

    def prefix_bytes(self, layout: Any) -> int:
        return PREFIX


@dataclass
class Layout:
    prefix: object = None


@dataclass
class Item:
    """As much of a sequence as counts here."""

    prefix_key: str
    video_key: str = ""
    prefix: Prefix | None = None
    reserved_bytes: int = 0
    has_video: bool = True
    layout: Layout = field(default_factory=Layout)


class Shop:
    def __init__(self, kv_bytes: int, feature_bytes: int = 10**6) -> None:
        self.prefixes: SharedPool[Prefix] = SharedPool(ByteBudget(kv_bytes))
        self.videos: SharedPool[Video] = SharedPool(ByteBudget(feature_bytes))
        self._room = Room(cast(Backend, Sizes()), self.prefixes, self.videos, lambda _: FEATURES)

    def fits(self, *items: Item) -> bool:
        return self._room.fits(cast(list[SequenceState], list(items)))

    def prefix(self, key: str, *, num_bytes: int = PREFIX, is_ready: bool = True) -> Prefix:
        prefix = Prefix(key, 0, num_tokens=4, video=None, num_bytes=num_bytes)
        prefix.num_run = 4 if is_ready else 0
        self.prefixes.add(prefix)
        return prefix


@pytest.mark.parametrize(("kv_bytes", "fits"), [(SEAT + PREFIX, True), (SEAT + PREFIX - 1, False)])
def test_one_needs_a_seat_and_its_prefix(kv_bytes: int, fits: bool) -> None:
    assert Shop(kv_bytes).fits(Item("a")) is fits


def test_questions_about_one_video_share_its_prefix() -> None:
    shop = Shop(3 * SEAT + PREFIX)
    assert shop.fits(Item("a"), Item("a"), Item("a"))
    assert not shop.fits(Item("a"), Item("a"), Item("b"))


def test_a_prefix_that_is_there_counts_with_what_it_takes_now() -> None:
    shop = Shop(SEAT + 12)
    shop.prefixes.release(shop.prefix("a", num_bytes=12))  # part of it lies in host memory
    assert shop.fits(Item("a")) and not shop.fits(Item("b"))


def test_an_idle_prefix_that_will_be_dropped_is_made_again() -> None:
    shop = Shop(SEAT + 12)
    shop.prefix("a", num_bytes=12, is_ready=False)  # of holders that are not asked about
    assert not shop.fits(Item("a"))
    held = shop.prefixes.get("a")
    assert shop.fits(Item("a", prefix=held))


def test_what_is_reserved_counts_as_reserved() -> None:
    shop = Shop(25 + PREFIX)
    assert shop.fits(Item("a", reserved_bytes=25)) and not shop.fits(Item("a", reserved_bytes=26))


def test_features_have_a_budget_of_their_own_and_go_with_a_prefix_that_is_ready() -> None:
    shop = Shop(10**6, feature_bytes=2 * FEATURES)
    items = [Item(key, video_key=key) for key in "abc"]
    assert shop.fits(*items[:2]) and not shop.fits(*items)
    ready = shop.prefix("c")
    items[2].prefix = ready
    assert shop.fits(*items), "its features are needed no longer"
    ready.video = Video("c", None, (0,), (0,), num_bytes=FEATURES)
    assert not shop.fits(*items)


def test_one_video_under_two_policies_has_its_features_once() -> None:
    shop = Shop(10**6, feature_bytes=FEATURES)
    assert shop.fits(Item("full", video_key="v"), Item("dycoke", video_key="v"))
    assert shop.fits(Item("a", video_key="v"), Item("text", has_video=False))
