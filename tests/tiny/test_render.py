"""Pictures of scenes: shapes, their places, and noise that a scene's seed alone decides."""

import numpy as np
import pytest

from dycoke_core.tiny.render import RGB, inside, render, render_frames
from dycoke_core.tiny.scenes import SHAPES, SIZE, sample_scene


def test_a_scene_is_rendered_as_bytes_of_its_size() -> None:
    scene = sample_scene(3, num_frames=8)
    frames = render(scene)
    assert frames.shape == (8, SIZE, SIZE, 3) and frames.dtype == np.uint8
    assert (render(scene) == frames).all()


def test_frames_resemble_each_other_and_are_never_the_same() -> None:
    frames = render(sample_scene(3, num_frames=8)).astype(int)
    difference = abs(frames[1:] - frames[:-1])
    assert (difference.reshape(7, -1).max(axis=1) > 0).all()
    assert np.median(difference) < 10


def test_a_part_of_a_scene_shows_what_the_whole_does_but_for_noise() -> None:
    scene = sample_scene(3, num_frames=8)
    part, whole = render_frames(scene, range(4, 6)), render(scene)[4:6]
    difference = abs(np.stack(part).astype(int) - whole)
    assert np.percentile(difference, 99) < 30


def test_a_thing_stands_where_its_path_says_in_its_colour() -> None:
    scene = sample_scene(3, num_frames=8)
    frames = render(scene)
    for thing in scene.things:
        if thing.paint is not None or thing.shape == "cross":
            continue
        for frame in list(thing.visible)[:2]:
            x, y = (round(float(place)) for place in thing.path[frame])
            if 0 <= x < SIZE and 0 <= y < SIZE:
                pixel = frames[frame, y, x].astype(int)
                assert abs(pixel - RGB[thing.color_at(frame)]).max() < 40


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_lies_around_its_middle_as_far_as_its_radius(shape: str) -> None:
    y, x = np.mgrid[-15:16, -15:16] / 10
    mask = inside(shape, x, y)
    assert mask[15, 15] and mask.any()
    assert abs(x[mask]).max() <= 1.05 and abs(y[mask]).max() <= 1
    assert (mask == mask[:, ::-1]).all(), "the same to its left and its right"


def test_shapes_differ_in_what_they_cover() -> None:
    y, x = np.mgrid[-10:11, -10:11] / 10
    areas = {shape: int(inside(shape, x, y).sum()) for shape in SHAPES}
    assert len(set(areas.values())) == len(SHAPES)
