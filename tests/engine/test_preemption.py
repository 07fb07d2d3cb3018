"""Which sequences make room: as few as possible, none without need, none too often."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.config import PRIORITIES, Priority
from dycoke_core.engine.preemption import MAX_PREEMPTIONS, choose_victims


@dataclass(eq=False)
class Item:
    name: str
    priority: Priority = "low"
    size: int = 1
    num_features: int = 0
    num_tokens_at_stake: int = 0
    arrival: int = 0
    num_preemptions: int = 0
    has_come_in_turn: bool = False
    has_work_left: bool = True


def needs(size: int) -> Callable[[Sequence[Item]], bool]:
    return lambda leaving: sum(item.size for item in leaving) >= size


def victims(priority: Priority, size: int, *running: Item) -> str:
    chosen = choose_victims(priority, running, needs(size))
    return "".join(sorted(item.name for item in chosen))


def test_only_low_makes_room_and_not_for_its_like() -> None:
    running = (Item("h", "high"), Item("n", "normal"), Item("l", "low"))
    assert victims("high", 1, *running) == victims("normal", 1, *running) == "l"
    assert victims("high", 2, *running) == ""
    assert victims("low", 1, *running) == ""


def test_who_has_least_to_do_again_goes_first_then_the_youngest() -> None:
    running = (
        Item("a", num_tokens_at_stake=9, arrival=9),
        Item("b", num_tokens_at_stake=5, arrival=1),
        Item("c", num_tokens_at_stake=5, arrival=2),
    )
    assert [victims("high", size, *running) for size in range(1, 4)] == ["c", "bc", "abc"]


def test_nobody_goes_in_vain() -> None:
    assert victims("high", 3, Item("a"), Item("b")) == ""
    assert victims("high", 0, Item("a")) == "", "there is room already"


def test_no_more_go_than_are_needed() -> None:
    small = [Item(name, num_tokens_at_stake=n) for n, name in enumerate("abc")]
    large = Item("d", size=4, num_tokens_at_stake=9)
    assert victims("high", 4, *small, large) == "d"
    assert victims("high", 5, *small, large) == "cd"


def test_who_has_made_room_often_enough_or_came_in_its_turn_or_is_ending_stays() -> None:
    running = (
        Item("a", num_preemptions=MAX_PREEMPTIONS),
        Item("b", has_come_in_turn=True),
        Item("c", has_work_left=False),
        Item("d", num_preemptions=MAX_PREEMPTIONS - 1),
    )
    assert victims("high", 1, *running) == "d"
    assert victims("high", 2, *running) == ""


@given(
    priority=st.sampled_from(PRIORITIES),
    size=st.integers(0, 30),
    num_features=st.integers(0, 30),
    running=st.lists(
        st.builds(
            Item,
            name=st.just(""),
            priority=st.sampled_from(PRIORITIES),
            size=st.integers(1, 9),
            num_features=st.integers(0, 9),
            num_tokens_at_stake=st.integers(0, 5),
            arrival=st.integers(0, 99),
            num_preemptions=st.integers(0, MAX_PREEMPTIONS),
            has_come_in_turn=st.booleans(),
        ),
        max_size=8,
    ),
)
def test_victims_are_low_suffice_and_are_all_needed(
    priority: Priority, size: int, num_features: int, running: list[Item]
) -> None:
    """Where what one needs is of two kinds, such as keys and values and a video's features."""

    def is_enough(leaving: Sequence[Item]) -> bool:
        has_features = sum(item.num_features for item in leaving) >= num_features
        return has_features and needs(size)(leaving)

    chosen = choose_victims(priority, running, is_enough)
    if not chosen:
        return
    assert is_enough(chosen)
    for item in chosen:
        assert item.priority == "low" != priority
        assert item.num_preemptions < MAX_PREEMPTIONS and not item.has_come_in_turn
        assert not is_enough([other for other in chosen if other is not item])
