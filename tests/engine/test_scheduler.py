"""The scheduler on its own: order, bounds and fairness."""

from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.engine.scheduler import Scheduler
from dycoke_core.sequence import Sequence, Stage
from tests.engine.recording import make_sequence

FRAMES = make_sequence().frames


def plain_sequence(name: str) -> Sequence:
    return Sequence(name, (), FRAMES)


def test_one_prompt_is_worked_on_beside_all_decodes() -> None:
    scheduler = Scheduler(max_running=4)
    sequences = [plain_sequence(name) for name in "abcde"]
    for sequence in sequences:
        scheduler.add(sequence)
    sequences[0].stage = sequences[2].stage = Stage.DECODING
    step = scheduler.schedule()
    assert step.decode == (sequences[0], sequences[2])
    assert step.prefill is sequences[1]
    assert list(scheduler.waiting) == [sequences[4]]


class Load:
    """Sequences that need so many slices, then so many tokens, run against a scheduler."""

    def __init__(self, scheduler: Scheduler, plans: list[tuple[int, int]]) -> None:
        self.scheduler = scheduler
        self.arriving = [plain_sequence(str(index)) for index in range(len(plans))]
        self.slices = {str(index): plan[0] for index, plan in enumerate(plans)}
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
        if step.prefill is not None:
            self._work_on_prompt(step.prefill)

    def _work_on_prompt(self, sequence: Sequence) -> None:
        name = sequence.sequence_id
        if name not in self.started:
            self.started.append(name)
        self.slices[name] -= 1
        if self.slices[name] == 0:
            sequence.stage = Stage.DECODING


@given(
    max_running=st.integers(1, 4),
    plans=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=12),
    data=st.data(),
)
def test_first_come_first_served_and_all_are_served(
    max_running: int, plans: list[tuple[int, int]], data: st.DataObject
) -> None:
    scheduler = Scheduler(max_running)
    load = Load(scheduler, plans)
    num_slices_and_tokens = sum(slices + max(tokens, 1) for slices, tokens in plans)
    for _ in range(num_slices_and_tokens + len(plans)):
        if load.arriving and (not scheduler.has_work or data.draw(st.booleans())):
            load.arrive()
        alive = [*scheduler.running, *scheduler.waiting]
        if alive and data.draw(st.integers(0, 9)) == 0:
            load.end(data.draw(st.sampled_from(alive)))
        load.step()
        assert len(scheduler.running) <= max_running
    while load.arriving:
        load.arrive()
    for _ in range(num_slices_and_tokens):
        load.step()
    assert not scheduler.has_work, "every step advances what runs, so all have ended by now"
    assert load.started == sorted(load.started, key=int), "nothing overtakes"
    assert load.ended == {str(index) for index in range(len(plans))}
