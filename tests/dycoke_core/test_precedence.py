"""Who goes first: by priority, then by age; the oldest at the latest after a number of others."""

import re
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import app.store
from dycoke_core.config import PRIORITIES, Priority
from dycoke_core.precedence import MAX_OVERTAKES, RANKS, Precedence, best

NAMED_PRIORITIES: dict[str, Priority] = {"h": "high", "n": "normal", "l": "low"}


def order(precedence: Precedence, names: list[str]) -> list[str]:
    """Of items whose names begin with their priority's letter."""
    return precedence.ordered(names, lambda name: NAMED_PRIORITIES[name[0]])


def test_the_best_priority_goes_first_and_the_oldest_of_it_before_the_others() -> None:
    names = ["l1", "n1", "h1", "n2", "l2", "h2"]
    assert order(Precedence(), names) == ["h1", "h2", "n1", "n2", "l1", "l2"]
    assert order(Precedence(), []) == []


def test_the_oldest_has_its_turn_when_enough_others_have_overtaken_it() -> None:
    precedence = Precedence()
    for _ in range(MAX_OVERTAKES):
        assert order(precedence, ["l1", "n1", "h1"]) == ["h1", "n1", "l1"]
        precedence.note(is_oldest_served=False)
    assert order(precedence, ["l1", "n1", "h1"]) == ["l1", "h1", "n1"]
    assert order(precedence, ["l1", "n1", "h1"])[0] == "l1", "its turn lasts until it is served"
    precedence.note(is_oldest_served=True)
    assert order(precedence, ["l2", "n1", "h1"])[0] == "h1"


def test_the_best_of_several_priorities() -> None:
    assert best("low", "normal") == "normal"
    assert best("normal", "high", "low") == "high"


def test_the_queues_script_goes_by_the_same_rule() -> None:
    script = (Path(app.store.__file__).parent / "lua" / "share.lua").read_text()
    (ranks,) = re.findall(r"^local RANKS = \{(.*)\}", script, re.MULTILINE)
    expected = ", ".join(f"{priority} = {rank + 1}" for priority, rank in RANKS.items())
    assert ranks == expected, "from 1 on, as Lua counts"
    assert re.findall(r"^local MAX_OVERTAKES = (\d+)", script, re.MULTILINE) == [str(MAX_OVERTAKES)]


@dataclass
class Item:
    number: int
    priority: Priority
    num_older: int  # that waited when it came
    waited: int = 0  # times that another was served since


@given(arrivals=st.lists(st.lists(st.sampled_from(PRIORITIES), max_size=3), max_size=60))
def test_nobody_waits_longer_than_its_bound(arrivals: list[list[Priority]]) -> None:
    precedence = Precedence()
    waiting: list[Item] = []
    number = 0
    while arrivals or waiting:
        for priority in arrivals.pop(0) if arrivals else []:
            waiting.append(Item(number, priority, num_older=len(waiting)))
            number += 1
        if not waiting:
            continue
        served = precedence.ordered(waiting, lambda item: item.priority)[0]
        precedence.note(is_oldest_served=served is waiting[0])
        waiting.remove(served)
        assert served.waited + 1 <= (served.num_older + 1) * (MAX_OVERTAKES + 1)
        for item in waiting:
            item.waited += 1


@given(priority=st.sampled_from(PRIORITIES), num_items=st.integers(1, 30))
def test_one_priority_for_all_is_first_come_first_served(
    priority: Priority, num_items: int
) -> None:
    precedence = Precedence()
    waiting = list(range(num_items))
    while waiting:
        assert precedence.ordered(waiting, lambda _: priority) == waiting
        precedence.note(is_oldest_served=True)
        waiting.pop(0)
