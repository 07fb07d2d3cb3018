"""The scheduler on its own: order, bounds and fairness."""

from collections.abc import Iterable
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.engine.scheduler import Chunk, PromptWork, Scheduler, WorkKind


@dataclass(eq=False)
class Item:
    """What the scheduler sees of a sequence."""

    name: str
    prompt_work: PromptWork | None
    can_decode: bool = False


@dataclass
class Door:
    """Admits everybody, or only those named."""

    names: set[str] | None = None

    def admit(self, state: Item) -> bool:
        return self.names is None or state.name in self.names


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


class Load:
    """Sequences that need so many pieces of prompt work, then so many tokens."""

    def __init__(self, max_running: int, plans: list[tuple[int, int]]) -> None:
        self.scheduler: Scheduler[Item] = Scheduler(max_running, 100, Door())
        self.arriving = [Item(str(i), chunk(str(i), 60)) for i in range(len(plans))]
        self.pieces = {str(index): plan[0] for index, plan in enumerate(plans)}
        self.tokens = {str(index): plan[1] for index, plan in enumerate(plans)}
        self.started: list[str] = []
        self.ended: set[str] = set()

    def arrive(self) -> None:
        self.scheduler.add(self.arriving.pop(0))

    def end(self, item: Item) -> None:
        self.scheduler.remove(item)
        self.ended.add(item.name)

    def step(self) -> None:
        step = self.scheduler.schedule()
        for item in step.decode:
            self.tokens[item.name] -= 1
            if self.tokens[item.name] <= 0:
                self.end(item)
        for piece in step.prefixes:
            self._work_on_prompt(piece.state)

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
