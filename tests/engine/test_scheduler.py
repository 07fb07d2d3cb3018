"""The scheduler on its own: order, bounds and fairness."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.config import PRIORITIES, Priority
from dycoke_core.engine.preemption import MAX_PREEMPTIONS
from dycoke_core.engine.scheduler import Chunk, PromptWork, Schedule, Scheduler, WorkKind
from dycoke_core.precedence import MAX_OVERTAKES


@dataclass(eq=False)
class Item:
    """What the scheduler sees of a sequence."""

    name: str
    prompt_work: PromptWork | None
    can_decode: bool = False
    priority: Priority = "normal"
    size: int = 0  # of what `Door` has room for
    num_tokens_at_stake: int = 0
    num_preemptions: int = 0
    arrival: int = 0
    has_come_in_turn: bool = False

    @property
    def has_work_left(self) -> bool:
        return self.prompt_work is not None or self.can_decode


@dataclass
class Door:
    """Admits all, or only those named, while there is room."""

    names: set[str] | None = None
    room: int = 10**9
    inside: list[Item] = field(default_factory=list)
    lacking: set[str] = field(default_factory=set)  # names of those without frames

    def admit(self, state: Item) -> bool:
        may_enter = self.names is None or state.name in self.names
        if not may_enter or not self.fits([*self.inside, state]):
            return False
        assert state.name not in self.lacking
        self.inside.append(state)
        return True

    def lacks_frames(self, state: Item) -> bool:
        return state.name in self.lacking

    def fits(self, states: Sequence[Item]) -> bool:
        return sum(item.size for item in states) <= self.room

    def keeping(self, state: Item) -> AbstractContextManager[None]:
        return nullcontext()

    def preempt(self, state: Item) -> Item:
        self.inside.remove(state)
        return replace(state, num_preemptions=state.num_preemptions + 1)


def chunk(key: str, num_tokens: int, kind: WorkKind = WorkKind.PREFIX) -> PromptWork:
    return PromptWork(kind, key, num_tokens)


def vision(key: str) -> PromptWork:
    return PromptWork(WorkKind.VISION, key, 0)


def make_scheduler(
    works: dict[str, PromptWork], *, max_running: int = 8, max_prompt_tokens: int = 100
) -> Scheduler[Item]:
    """Sequences by name, with the prompt work that each has next."""
    scheduler: Scheduler[Item] = Scheduler(max_running, max_prompt_tokens, Door())
    for name, work in works.items():
        scheduler.add(Item(name, work))
    return scheduler


def names(items: Iterable[Item | Chunk[Item]]) -> str:
    return "".join(item.state.name if isinstance(item, Chunk) else item.name for item in items)


def test_prompts_are_worked_on_beside_all_decodes() -> None:
    scheduler = make_scheduler({name: chunk(name, 60) for name in "abcde"}, max_running=4)
    first, _, third, *_ = scheduler.waiting
    for item in (first, third):
        item.prompt_work, item.can_decode = None, True
    step = scheduler.schedule()
    assert names(step.decode) == "ac"
    assert names(step.prefixes) == "b", "the next prompt of 60 would exceed the step's 100 tokens"
    assert names(scheduler.waiting) == "e"
    assert names(step.running) == "abcd"


def test_small_prompts_share_a_step() -> None:
    scheduler = make_scheduler({name: chunk(name, 30) for name in "abcde"})
    assert names(scheduler.schedule().prefixes) == "abc"


def test_a_prompt_larger_than_the_budget_goes_alone() -> None:
    scheduler = make_scheduler({"a": chunk("a", 500), "b": chunk("b", 1)})
    assert names(scheduler.schedule().prefixes) == "a"


def test_what_is_left_of_the_budget_goes_to_younger_prompts_that_fit() -> None:
    sizes = {"a": 60, "b": 60, "c": 10}
    scheduler = make_scheduler({name: chunk(name, size) for name, size in sizes.items()})
    assert names(scheduler.schedule().prefixes) == "ac"


def test_prefixes_and_questions_share_the_budget() -> None:
    works = {"a": chunk("a", 60), "b": chunk("b", 30, WorkKind.QUESTION), "c": chunk("c", 30)}
    step = make_scheduler(works).schedule()
    assert (names(step.prefixes), names(step.questions)) == ("a", "b")
    assert [piece.num_tokens for piece in (*step.prefixes, *step.questions)] == [60, 30]


def test_shared_work_is_done_once() -> None:
    works = {"a": chunk("video", 30), "b": chunk("video", 30), "c": chunk("c", 30)}
    assert names(make_scheduler(works).schedule().prefixes) == "ac"


def test_all_that_wait_for_the_tower_are_named_and_cost_no_tokens() -> None:
    works = {"a": vision("a"), "b": vision("b"), "c": chunk("c", 100)}
    step = make_scheduler(works).schedule()
    assert (names(step.encode), names(step.prefixes)) == ("ab", "c")


def test_what_is_not_admitted_keeps_its_place() -> None:
    door = Door(set())
    scheduler: Scheduler[Item] = Scheduler(4, 100, door)
    for name in "ab":
        scheduler.add(Item(name, chunk(name, 1)))
    door.names = {"b"}
    assert scheduler.schedule().prefixes == ()
    door.names = {"a", "b"}
    assert names(scheduler.schedule().prefixes) == "ab"


# --- priorities ---


def prioritized(name: str, num_tokens: int = 60) -> Item:
    """Its name begins with the letter of its priority."""
    (priority,) = (each for each in PRIORITIES if each[0] == name[0])
    return Item(name, chunk(name, num_tokens), priority=priority)


def test_better_priorities_are_admitted_first_and_each_in_order_of_arrival() -> None:
    scheduler: Scheduler[Item] = Scheduler(4, 1000, Door())
    for name in ("l1", "n1", "h1", "n2", "h2", "l2"):
        scheduler.add(prioritized(name))
    assert [item.name for item in scheduler.schedule().running] == ["h1", "h2", "n1", "n2"]
    assert [item.name for item in scheduler.waiting] == ["l1", "l2"]


def test_nobody_passes_the_next_one_while_there_is_no_room_for_it() -> None:
    scheduler: Scheduler[Item] = Scheduler(4, 1000, Door({"l1"}))
    for name in ("l1", "h1"):
        scheduler.add(prioritized(name))
    assert scheduler.schedule().running == ()


def test_the_oldest_is_admitted_after_so_many_of_better_priority() -> None:
    scheduler: Scheduler[Item] = Scheduler(1, 1000, Door())
    scheduler.add(prioritized("l"))
    admitted = []
    for number in range(MAX_OVERTAKES + 2):
        scheduler.add(prioritized(f"h{number}"))
        (running,) = scheduler.schedule().running
        admitted.append(running.name)
        scheduler.remove(running)
    assert admitted == [*(f"h{number}" for number in range(MAX_OVERTAKES)), "l", "h4"]


def test_chunks_of_better_priority_go_before_older_ones() -> None:
    scheduler: Scheduler[Item] = Scheduler(8, 100, Door())
    for item in (prioritized("l1", 60), prioritized("l2", 30), prioritized("n", 50)):
        scheduler.add(item)
    scheduler.schedule()
    scheduler.add(prioritized("h", 20))
    step = scheduler.schedule()
    assert [piece.state.name for piece in step.prefixes] == ["h", "n", "l2"]


def test_the_oldest_prompt_gets_its_piece_after_so_many_of_better_priority() -> None:
    scheduler: Scheduler[Item] = Scheduler(8, 100, Door())
    scheduler.add(prioritized("l"))
    scheduler.schedule()
    scheduler.add(prioritized("h"))
    pieces = [names(scheduler.schedule().prefixes) for _ in range(2 * (MAX_OVERTAKES + 1))]
    assert pieces == [*"h" * MAX_OVERTAKES, "l"] * 2


def test_work_that_is_shared_has_the_best_of_its_priorities_and_serves_all() -> None:
    scheduler: Scheduler[Item] = Scheduler(8, 100, Door())
    for name, key in (("l", "video"), ("n", "other"), ("h", "video")):
        item = prioritized(name)
        item.prompt_work = chunk(key, 60)
        scheduler.add(item)
    for _ in range(3 * MAX_OVERTAKES):
        assert names(scheduler.schedule().prefixes) == "h", "the oldest is served by the best"


def test_better_ones_that_fit_beside_it_pass_the_one_whose_turn_has_come() -> None:
    door = Door(room=LARGEST)
    scheduler: Scheduler[Item] = Scheduler(8, 1000, door)
    low = prioritized("low")
    low.size = LARGEST - 2
    scheduler.add(low)

    def come(*names: str) -> list[str]:
        for name in names:
            item = prioritized(name)
            item.size = 1
            scheduler.add(item)
        return [item.name for item in scheduler.schedule().running]

    before = [f"h{number}" for number in range(MAX_OVERTAKES)]
    assert come(*before) == before
    assert come("n1", "h4", "h5", "h6") == [*before, "h4", "h5"], "there is room for two next to it"
    for item in list(scheduler.running[:MAX_OVERTAKES]):
        door.inside.remove(item)
        scheduler.remove(item)
    assert come("h7") == ["h4", "h5", "low"]
    assert low.has_come_in_turn


def test_nobody_of_its_priority_passes_the_one_whose_turn_has_come() -> None:
    scheduler: Scheduler[Item] = Scheduler(8, 1000, Door(room=LARGEST))
    for name, size in (("n", LARGEST), *((f"h{number}", 1) for number in range(MAX_OVERTAKES))):
        item = prioritized(name)
        item.size = size
        scheduler.add(item)
    before = [item.name for item in scheduler.schedule().running]
    scheduler.add(prioritized("n2", 0))
    scheduler.add(prioritized("l", 0))
    assert [item.name for item in scheduler.schedule().running] == before


EACH = MAX_OVERTAKES + 1  # times in which the oldest is served once
LARGEST = 9  # size of a sequence, and the room for all of them together


class Turns:
    """Counts overtakes as `Precedence` does, and tells those that were let past the oldest apart:
    it is the oldest's turn already, and they take no room that it waits for."""

    def __init__(self) -> None:
        self._num_overtakes = 0

    @property
    def has_oldest_its_turn(self) -> bool:
        return self._num_overtakes >= MAX_OVERTAKES

    def passes(self, item: Item, still_waiting: Iterable[Item]) -> bool:
        """Of one that was admitted while the others still waited."""
        is_oldest = all(item.arrival < other.arrival for other in still_waiting)
        if self.has_oldest_its_turn and not is_oldest:
            return True
        self._num_overtakes = 0 if is_oldest else self._num_overtakes + 1
        return False


class Load:
    """Sequences that need this many pieces of prompt work, then this many tokens."""

    def __init__(
        self,
        max_running: int,
        plans: list[tuple[int, int]],
        priorities: list[Priority] | None = None,
        sizes: list[int] | None = None,
    ) -> None:
        self.door = Door(room=LARGEST)
        self.scheduler: Scheduler[Item] = Scheduler(max_running, 100, self.door)
        self.arriving = [Item(str(i), chunk(str(i), 60)) for i in range(len(plans))]
        for item, priority, size in zip(self.arriving, priorities or [], sizes or [], strict=False):
            item.priority, item.size = priority, size
        self._plans = plans
        self.pieces = {str(index): plan[0] for index, plan in enumerate(plans)}
        self.tokens = {str(index): plan[1] for index, plan in enumerate(plans)}
        self.started: list[str] = []
        self.ended: set[str] = set()

    def arrive(self) -> None:
        self.scheduler.add(self.arriving.pop(0))

    def end(self, item: Item) -> None:
        self.scheduler.remove(item)
        self.ended.add(item.name)
        if item in self.door.inside:
            self.door.inside.remove(item)

    def step(self) -> Schedule[Item]:
        step = self.scheduler.schedule()
        for item in (preempted.state for preempted in step.preempted):  # all over again
            item.prompt_work, item.can_decode = chunk(item.name, 60), False
            self.pieces[item.name] = self._plans[int(item.name)][0]
        for item in step.decode:
            self.tokens[item.name] -= 1
            if self.tokens[item.name] <= 0:
                self.end(item)
        for piece in step.prefixes:
            self._work_on_prompt(piece.state)
        return step

    def _work_on_prompt(self, item: Item) -> None:
        if item.name not in self.started:
            self.started.append(item.name)
        self.pieces[item.name] -= 1
        if self.pieces[item.name] == 0:
            item.prompt_work, item.can_decode = None, True


@given(
    max_running=st.integers(1, 4),
    plans=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=12),
    data=st.data(),
)
def test_first_come_first_served_and_all_are_served(
    max_running: int, plans: list[tuple[int, int]], data: st.DataObject
) -> None:
    load = Load(max_running, plans)
    scheduler = load.scheduler
    num_pieces_and_tokens = sum(pieces + max(tokens, 1) for pieces, tokens in plans)
    for _ in range(num_pieces_and_tokens + len(plans)):
        if load.arriving and (not scheduler.has_work or data.draw(st.booleans())):
            load.arrive()
        alive = [*scheduler.running, *scheduler.waiting]
        if alive and data.draw(st.integers(0, 9)) == 0:
            load.end(data.draw(st.sampled_from(alive)))
        load.step()
        assert len(scheduler.running) <= max_running
    while load.arriving:
        load.arrive()
    for _ in range(num_pieces_and_tokens):
        load.step()
    assert not scheduler.has_work, "every step advances what runs, so all have ended by now"
    assert load.started == sorted(load.started, key=int), "nothing overtakes"
    assert load.ended == {str(index) for index in range(len(plans))}


@given(
    max_running=st.integers(1, 4),
    plans=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=24),
    data=st.data(),
)
def test_nobody_waits_longer_than_its_bound_whatever_comes_with_better_priority(
    max_running: int, plans: list[tuple[int, int]], data: st.DataObject
) -> None:
    """This many admissions, its own included, and then this many steps of prompt work. A preempted
    sequence waits again, before all that are younger."""
    num = len(plans)
    priorities = data.draw(st.lists(st.sampled_from(PRIORITIES), min_size=num, max_size=num))
    sizes = data.draw(st.lists(st.integers(0, LARGEST), min_size=num, max_size=num))
    load = Load(max_running, plans, priorities, sizes)
    scheduler = load.scheduler
    admissions_left: dict[str, int] = {}
    steps_left: dict[str, int] = {}
    turns = Turns()
    while load.arriving or scheduler.has_work:
        if load.arriving and (not scheduler.has_work or data.draw(st.booleans())):
            load.arrive()
            num_waiting = len(scheduler.waiting)
            admissions_left[scheduler.waiting[-1].name] = num_waiting * EACH
        before, pieces = {item.name for item in scheduler.running}, dict(load.pieces)
        step = load.step()
        assert len(step.running) <= max_running
        assert sum(item.size for item in step.running) <= LARGEST
        for place, item in enumerate(step.running):
            if item.name in before:
                continue
            left = admissions_left.pop(item.name)
            if not turns.passes(item, [*scheduler.waiting, *step.running[place + 1 :]]):
                assert left > 0
                admissions_left = {name: left - 1 for name, left in admissions_left.items()}
            num_pieces = sum(pieces[older.name] for older in step.running[: place + 1])
            steps_left[item.name] = num_pieces * EACH
        for preempted in step.preempted:
            item = preempted.state
            assert item.num_preemptions <= MAX_PREEMPTIONS
            place = scheduler.waiting.index(item)
            for younger in scheduler.waiting[place + 1 :]:
                admissions_left[younger.name] = admissions_left.get(younger.name, 0) + EACH
            admissions_left[item.name] = (place + 1) * EACH
            steps_left.pop(item.name, None)
        if step.prefixes:
            steps_left = {name: left - 1 for name, left in steps_left.items()}
        for name in [name for name in steps_left if load.pieces[name] == 0]:
            assert steps_left.pop(name) >= 0
    assert not admissions_left and not steps_left
    assert len(load.ended) == num


@given(
    max_running=st.integers(2, 8),
    plans=st.lists(st.tuples(st.just(1), st.integers(0, 9)), min_size=8, max_size=24),
    data=st.data(),
)
def test_whose_turn_has_come_waits_only_for_those_that_ran_before(
    max_running: int, plans: list[tuple[int, int]], data: st.DataObject
) -> None:
    """However many of better priority are let past it."""
    num = len(plans)
    priorities: list[Priority] = [data.draw(st.sampled_from(PRIORITIES[:2]))]
    priorities += ["high"] * (num - 1)
    sizes = [data.draw(st.integers(1, LARGEST)), *[data.draw(st.integers(1, 3))] * (num - 1)]
    load = Load(max_running, plans, priorities, sizes)
    scheduler, turns = load.scheduler, Turns()
    waits_for: dict[int, set[str]] = {}  # by arrival of whose turn it was
    while load.arriving or scheduler.has_work:
        for _ in range(data.draw(st.integers(1, 5))):
            if load.arriving:
                load.arrive()
        before = {item.name for item in scheduler.running}
        step = load.step()
        passing = {
            item.name
            for place, item in enumerate(step.running)
            if item.name not in before
            and turns.passes(item, [*scheduler.waiting, *step.running[place + 1 :]])
        }
        running = {item.name for item in step.running}
        if scheduler.waiting and turns.has_oldest_its_turn:
            ahead = waits_for.setdefault(scheduler.waiting[0].arrival, running - passing)
            assert ahead & running, "nothing that it waits for is still running"
    assert len(load.ended) == num


def test_who_makes_room_waits_in_the_place_of_its_age() -> None:
    door = Door(room=2)
    scheduler: Scheduler[Item] = Scheduler(8, 1000, door)
    for name in ("l1", "n1", "l2", "h1"):
        item = prioritized(name)
        item.size = 1
        scheduler.add(item)
        step = scheduler.schedule()
    assert [item.name for item in step.running] == ["n1", "h1"]
    assert [(each.state.name, each.made_room_for) for each in step.preempted] == [("l1", "high")]
    assert [item.name for item in scheduler.waiting] == ["l1", "l2"]


def test_those_let_past_the_one_whose_turn_has_come_preempt_like_others() -> None:
    scheduler: Scheduler[Item] = Scheduler(2 * MAX_OVERTAKES, 1000, Door())
    for number in range(2 * MAX_OVERTAKES):
        scheduler.add(prioritized(f"l{number}"))
    scheduler.schedule()
    for number in range(2 * MAX_OVERTAKES):
        scheduler.add(prioritized(f"h{number}"))
        step = scheduler.schedule()
        assert step.running[-1].name == f"h{number}", "it waits while one runs that may make room"
        assert [each.made_room_for for each in step.preempted] == ["high"]
    assert {item.name[0] for item in step.running} == {"h"}
    scheduler.add(prioritized("h late"))
    assert not scheduler.schedule().preempted, "nothing is left that may make room"
    scheduler.remove(scheduler.running[0])
    oldest = scheduler.waiting[0]
    assert oldest in scheduler.schedule().running and oldest.has_come_in_turn


def test_who_was_admitted_in_its_turn_does_not_make_room() -> None:
    scheduler: Scheduler[Item] = Scheduler(1, 1000, Door())
    scheduler.add(prioritized("l"))
    scheduler.add(prioritized("h0"))
    for number in range(1, MAX_OVERTAKES + 3):
        (running,) = scheduler.schedule().running
        scheduler.add(prioritized(f"h{number}"))
        if running.name == "l":
            break
        scheduler.remove(running)
    assert running.name == "l"
    step = scheduler.schedule()
    assert step.running == (running,) and not step.preempted


def test_room_that_lies_in_pieces_costs_nobody_his() -> None:
    class Pieces(Door):
        """Has the bytes, but not in pieces that fit."""

        def admit(self, state: Item) -> bool:
            return state.name == "l" and super().admit(state)

    scheduler: Scheduler[Item] = Scheduler(8, 1000, Pieces())
    scheduler.add(prioritized("l"))
    scheduler.schedule()
    scheduler.add(prioritized("h"))
    step = scheduler.schedule()
    assert names(step.running) == "l" and not step.preempted


def test_who_lacks_frames_stands_aside_and_comes_back_to_the_place_of_its_age() -> None:
    door = Door(lacking={"a"})
    scheduler: Scheduler[Item] = Scheduler(1, 1000, door)
    for name in "abc":
        scheduler.add(Item(name, chunk(name, 1)))
    assert names(scheduler.schedule().running) == "b", "no sequence waits for the frames"
    assert (names(scheduler.waiting_for_frames), names(scheduler.waiting)) == ("a", "c")
    (lacking,) = scheduler.waiting_for_frames
    door.lacking.clear()
    scheduler.resume(lacking)
    assert (names(scheduler.waiting_for_frames), names(scheduler.waiting)) == ("", "ac")
    scheduler.remove(scheduler.running[0])
    assert names(scheduler.schedule().running) == "a"


def test_frames_are_asked_for_when_there_is_room() -> None:
    door = Door(room=1, lacking={"b"})
    scheduler: Scheduler[Item] = Scheduler(8, 1000, door)
    for name in "ab":
        scheduler.add(Item(name, chunk(name, 1), size=1))
    scheduler.schedule()
    assert names(scheduler.waiting) == "b" and not scheduler.waiting_for_frames
    door.inside.clear()
    scheduler.remove(scheduler.running[0])
    scheduler.schedule()
    assert names(scheduler.waiting_for_frames) == "b" and not scheduler.waiting


def test_who_waits_for_frames_is_no_work_and_can_be_removed() -> None:
    scheduler: Scheduler[Item] = Scheduler(8, 1000, Door(lacking={"a"}))
    scheduler.add(Item("a", chunk("a", 1)))
    assert not scheduler.schedule().running and not scheduler.has_work
    scheduler.remove(scheduler.waiting_for_frames[0])
    assert not scheduler.waiting_for_frames
