"""The synthetic world: reproducible, its splits disjoint, its pixels what its scenes say."""

import numpy as np
import pytest

from dycoke_core.tiny.render import render
from dycoke_core.tiny.scenes import EVENTS, HELD_OUT, SIZE, Event, Scene, Thing, sample_scene
from tests.tiny.seen import look_at


def kinds(scene: Scene) -> set[tuple[str, str]]:
    """Every pair of a colour and a shape that can be seen."""
    return {
        (color, thing.shape)
        for thing in scene.things
        for color in (thing.color, thing.new_color)
        if color is not None
    }


@pytest.mark.parametrize("event", EVENTS)
def test_a_seed_gives_one_scene_and_one_video(event: Event) -> None:
    first, second = (sample_scene(7, num_frames=16, event=event) for _ in range(2))
    assert first.event == event
    np.testing.assert_array_equal(render(first), render(second))


def test_neither_touches_global_random_numbers() -> None:
    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    render(sample_scene(3, num_frames=8))
    assert np.random.get_state()[1].tolist() == state


def test_other_seeds_splits_and_lengths_give_other_scenes() -> None:
    scenes = [sample_scene(seed, split=split) for seed in range(50) for split in ("train", "test")]
    paths = {scene.things[0].path.tobytes() for scene in scenes}
    assert len(paths) == len(scenes)


def test_training_never_shows_a_held_out_pair_and_every_test_scene_does() -> None:
    for seed in range(500):
        assert not kinds(sample_scene(seed, num_frames=8)) & HELD_OUT
        things = sample_scene(seed, split="test", num_frames=8).things
        assert {(thing.color, thing.shape) for thing in things} & HELD_OUT


def test_things_stay_in_the_picture_and_apart() -> None:
    for seed in range(100):
        scene = sample_scene(seed, num_frames=16)
        for place, thing in enumerate(scene.things):
            assert (thing.path >= thing.radius).all()
            assert (thing.path <= SIZE - thing.radius).all()
            for other in scene.things[:place]:
                gap = abs(thing.path - other.path).max(axis=1)
                assert (gap > 0.9 * (thing.radius + other.radius)).all()


@pytest.mark.parametrize("seed", range(12))
def test_what_a_scene_says_can_be_seen(seed: int) -> None:
    scene = sample_scene(seed, split="test", num_frames=16)
    sightings, backgrounds = look_at(render(scene))
    assert backgrounds == [scene.background_at(frame) for frame in range(16)]
    seen = {(s.frame, s.color, s.shape) for s in sightings}
    said = {
        (frame, thing.color_at(frame), thing.shape)
        for thing in scene.things
        for frame in thing.visible
    }
    assert seen == said
    for sighting in sightings:
        thing = next(t for t in scene.things if _shows(t, sighting.frame, sighting.color))
        x, y = thing.path[sighting.frame]
        assert abs(sighting.x - x) <= 2
        assert abs(sighting.y - y) <= 5  # a triangle's middle is not its box's


def _shows(thing: Thing, frame: int, color: str) -> bool:
    return frame in thing.visible and thing.color_at(frame) == color


def test_blinks_are_apart_and_a_flash_is_brief() -> None:
    for seed in range(60):
        for num_frames in (8, 16, 32):
            blinking = sample_scene(seed, num_frames=num_frames, event="blink")
            (spells,) = [thing.blinks for thing in blinking.things if thing.blinks]
            bounds = [0, *(frame for spell in spells for frame in (spell.start, spell.stop))]
            assert bounds == sorted(set(bounds)) and bounds[-1] < num_frames
            flashing = sample_scene(seed, num_frames=num_frames, event="flash")
            (flash,) = [thing.visible for thing in flashing.things if thing.flashes]
            assert 1 <= len(flash) <= 2
