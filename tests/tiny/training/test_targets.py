"""Labels of what has happened, from the scene."""

import pytest

from dycoke_core.tiny.architecture import GRID
from dycoke_core.tiny.scenes import SIZE, sample_scene
from dycoke_core.tiny.training.targets import (
    MOTIONS,
    NOTHING,
    SEEN_COLORS,
    frame_labels,
    history_labels,
)


def test_history_tells_what_has_happened_so_far_and_no_more() -> None:
    scene = sample_scene(5, event="blink")
    labels = history_labels(scene)
    (thing,) = [thing for thing in scene.things if thing.blinks]
    place = scene.things.index(thing)
    assert (labels.background[0] == labels.background[-1]).all()
    for frame in range(scene.num_frames):
        cells = labels.blinks[frame][labels.color[frame] >= 0]
        begun = sum(blink.start <= frame for blink in thing.blinks)
        assert set(cells.tolist()) <= {0, begun}
    seen_early = labels.motion[: scene.num_frames // 4]
    assert (seen_early == NOTHING).all()
    assert labels.motion.max() < len(MOTIONS)
    assert place < len(scene.things)


def test_a_cell_is_labelled_with_the_thing_that_covers_it() -> None:
    scene = sample_scene(5, event="blink")
    frame = next(f for f in range(scene.num_frames) if any(f in t.visible for t in scene.things))
    labels = frame_labels(scene, frame)
    shown = [place for place, thing in enumerate(scene.things) if frame in thing.visible]
    assert set(labels.thing.tolist()) - {NOTHING} <= set(shown)
    for place in shown:
        x, y = scene.things[place].path[frame]
        cell = int(y // (SIZE / GRID)) * GRID + int(x // (SIZE / GRID))
        assert labels.shape[cell] != NOTHING, "the middle of a thing shows one"
        assert labels.outline[cell].max() == 1.0
    empty = labels.thing == NOTHING
    assert (labels.shape[empty] == NOTHING).all()
    assert (labels.color[empty] == SEEN_COLORS.index("none")).all()


def test_a_things_offset_leads_from_its_cells_to_its_middle() -> None:
    scene = sample_scene(5, event="blink")
    labels = frame_labels(scene, 0)
    side = SIZE / GRID
    for cell in (labels.thing != NOTHING).nonzero()[0].tolist():
        centre = scene.things[int(labels.thing[cell])].path[0]
        middle = ((cell % GRID + 0.5) * side, (cell // GRID + 0.5) * side)
        found = [m + side * offset for m, offset in zip(middle, labels.offset[cell], strict=True)]
        assert found == pytest.approx(list(centre), abs=1e-3)
