"""The scheduler on its own: order, bounds and fairness."""

from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.engine.scheduler import PromptWork, Scheduler
from dycoke_core.sequence import Sequence, Stage
from tests.engine.recording import make_sequence

FRAMES = make_sequence().frames


def plain_sequence(name: str) -> Sequence:
    return Sequence(name, (), FRAMES)


def make_scheduler(
    works: dict[str, PromptWork], *, max_running: int = 8, max_prompt_tokens: int = 100
) -> Scheduler:
    """Sequences by name, with the prompt work that each has next."""
    scheduler = Scheduler(
        max_running, max_prompt_tokens, lambda sequence: True, lambda s: works[s.sequence_id]
    )
    for name in works:
        scheduler.add(plain_sequence(name))
    return scheduler


def names(sequences: tuple[Sequence, ...]) -> str:
    return "".join(sequence.sequence_id for sequence in sequences)


def test_prompts_are_worked_on_beside_all_decodes() -> None:
    scheduler = make_scheduler({name: PromptWork(name, 60) for name in "abcde"}, max_running=4)
    first, _, third, *_ = scheduler.waiting
    first.stage = third.stage = Stage.DECODING
    step = scheduler.schedule()
    assert names(step.decode) == "ac"
    assert names(step.prompts) == "b", "the next prompt of 60 would exceed the step's 100 tokens"
    assert names(tuple(scheduler.waiting)) == "e"


def test_small_prompts_share_a_step() -> None:
    scheduler = make_scheduler({name: PromptWork(name, 30) for name in "abcde"})
    assert names(scheduler.schedule().prompts) == "abc"


def test_a_prompt_larger_than_the_budget_goes_alone() -> None:
    scheduler = make_scheduler({"a": PromptWork("a", 500), "b": PromptWork("b", 1)})
    assert names(scheduler.schedule().prompts) == "a"


def test_what_is_left_of_the_budget_goes_to_younger_prompts_that_fit() -> None:
    sizes = {"a": 60, "b": 60, "c": 10}
    scheduler = make_scheduler({name: PromptWork(name, size) for name, size in sizes.items()})
    assert names(scheduler.schedule().prompts) == "ac"


def test_shared_work_is_done_once() -> None:
    works = {"a": PromptWork("video", 30), "b": PromptWork("video", 30), "c": PromptWork("c", 30)}
    assert names(make_scheduler(works).schedule().prompts) == "ac"


def test_a_step_has_one_slice_of_the_vision_tower() -> None:
    works = {"a": PromptWork("a", 0), "b": PromptWork("b", 0), "c": PromptWork("c", 30)}
    assert names(make_scheduler(works).schedule().prompts) == "ac"


def test_what_is_not_admitted_keeps_its_place() -> None:
    admitted: set[str] = set()
    scheduler = Scheduler(
        4, 100, lambda s: s.sequence_id in admitted, lambda s: PromptWork(s.sequence_id, 1)
    )
    for name in "ab":
        scheduler.add(plain_sequence(name))
    admitted.add("b")
    assert scheduler.schedule().prompts == ()
    admitted.add("a")
    assert names(scheduler.schedule().prompts) == "ab"


class Load:
    """Sequences that need so many pieces of prompt work, then so many tokens."""

    def __init__(self, max_running: int, plans: list[tuple[int, int]]) -> None:
        self.scheduler = Scheduler(
            max_running, 100, lambda sequence: True, lambda s: PromptWork(s.sequence_id, 60)
        )
        self.arriving = [plain_sequence(str(index)) for index in range(len(plans))]
        self.pieces = {str(index): plan[0] for index, plan in enumerate(plans)}
        self.tokens = {str(index): plan[1] for index, plan in enumerate(plans)}
        self.started: list[str] = []
        self.ended: set[str] = set()

    def arrive(self) -> None:
        self.scheduler.add(self.arriving.pop(0))

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.ended.add(sequence.sequence_id)

    def step(self) -> None:
        step = self.scheduler.schedule()
        for sequence in step.decode:
            self.tokens[sequence.sequence_id] -= 1
            if self.tokens[sequence.sequence_id] <= 0:
                self.end(sequence)
        for sequence in step.prompts:
            self._work_on_prompt(sequence)

    def _work_on_prompt(self, sequence: Sequence) -> None:
        name = sequence.sequence_id
        if name not in self.started:
            self.started.append(name)
        self.pieces[name] -= 1
        if self.pieces[name] == 0:
            sequence.stage = Stage.DECODING


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
