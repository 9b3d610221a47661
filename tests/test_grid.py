"""method/grid.py: areas of discs and polygons against sampling and by hand, and distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from method import grid


# ----- discs -----
@given(st.tuples(st.floats(8, 30), st.floats(8, 30)), st.floats(2, 7), st.sampled_from([8, 16]))
@settings(max_examples=30, deadline=None)
def test_disc_areas_equal_fine_sampling(place, radius, subsamples):
    half = int(np.ceil(radius + 0.5))
    centre = np.floor(place).astype(int)
    steps = np.arange(-half, half + 1)
    row, col = (x.reshape(1, -1) for x in np.meshgrid(*(c + steps for c in centre), indexing="ij"))
    got = grid.disc_areas(np.array([place]), row, col, radius, subsamples)[0]
    fine = (np.arange(64) + 0.5) / 64
    for cell in range(0, row.size, 7):
        down = (row[0, cell] + fine[:, None] - place[0]) ** 2
        across = (col[0, cell] + fine - place[1]) ** 2
        assert got[cell] == pytest.approx(
            (down + across <= radius**2).mean(), abs=0.56 / subsamples
        )
    assert got.sum() == pytest.approx(np.pi * radius**2, rel=0.24 / subsamples)
    assert (got * subsamples**2 % 1 == 0).all()


# ----- polygons -----
def rings_of(*rings, polygon=None):
    """Rings are (points, hole); all of one polygon unless told."""
    points, hole = zip(*rings, strict=True)
    sizes = [len(part) for part in points]
    polygon = np.zeros(len(rings), int) if polygon is None else np.array(polygon)
    return grid.Rings(
        polygon, np.array(sizes), np.array(hole), np.concatenate(points).astype(float)
    )


def coverage_of(*rings, size=(14, 28)):
    """Areas (rows, columns), area and centroid of a polygon of rings."""
    rings = rings_of(*rings)
    image = np.zeros(size)
    found = grid.polygon_areas(rings)
    np.add.at(image, (found.row, found.col), found.area)
    return image, grid.polygon_moments(rings, 1)


def test_coverage_by_hand():
    image, (area, centroid) = coverage_of(([(0.5, 0.5), (2.5, 0.5), (2.5, 1.5), (0.5, 1.5)], False))
    assert image[:2, :3].tolist() == [[0.25, 0.5, 0.25]] * 2
    assert image.sum() == area[0] == 2
    assert centroid.tolist() == [[1.5, 1]]
    triangle, _ = coverage_of(([(0, 0), (2, 2), (0, 2)], False))
    assert triangle[:2, :2].tolist() == [[0.5, 0], [1, 0.5]]


def test_a_hole_counts_out_whichever_way_it_runs():
    outer, hole = [(1, 1), (5, 1), (5, 5), (1, 5)], [(2, 2), (3, 2), (3, 4), (2, 4)]
    for a in (outer, outer[::-1]):
        for b in (hole, hole[::-1]):
            image, (area, _) = coverage_of((a, False), (b, True))
            assert area[0] == 14
            assert image.sum() == pytest.approx(14)
            assert image[2:4, 2].tolist() == [0, 0]


@settings(max_examples=100, deadline=None)
@given(
    centre=st.tuples(st.floats(3, 9), st.floats(3, 9)),
    radii=st.lists(st.floats(0.05, 2.9), min_size=3, max_size=12),
    turn=st.floats(0, 6.3),
    snap=st.booleans(),
)
def test_coverage_is_that_of_fine_sampling(centre, radii, turn, snap):
    angle = turn + np.arange(len(radii)) * 2 * np.pi / len(radii)  # a star: never crosses itself
    points = np.array(centre) + np.array(radii)[:, None] * np.column_stack(
        [np.cos(angle), np.sin(angle)]
    )
    if snap:
        points = np.round(points)  # edges along the lines of the grid
    image, (area, _) = coverage_of((points, False), size=(12, 12))
    n = 32
    x, y = (np.arange(12 * n) + 0.5) / n, ((np.arange(12 * n) + 0.5) / n)[:, None]
    inside = np.zeros((12 * n, 12 * n), int)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 == y1:
            continue
        crosses = (
            (y >= min(y0, y1)) & (y < max(y0, y1)) & (x >= x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        )
        inside += crosses * (1 if y1 < y0 else -1)
    sampled = np.clip(np.abs(inside), 0, 1).reshape(12, n, 12, n).mean((1, 3))
    if snap:  # what was a star may cross itself now
        return np.testing.assert_array_less(image, 1 + 1e-9)
    length = np.linalg.norm(points - np.roll(points, -1, axis=0), axis=1).sum()
    assert np.abs(image - sampled).max() < 0.12
    assert abs(image.sum() - sampled.sum()) < 0.5 * length / n + 1e-3
    assert image.sum() == pytest.approx(area[0], abs=1e-6)


def test_polygons_in_blocks_are_those_at_once_and_keep_their_numbers(monkeypatch):
    """Polygons 3, 5, 6 and 9 of 10, one with a hole and one of two parts, one without an area."""
    square, hole = [(0.5, 0.5), (3.5, 0.5), (3.5, 3.5), (0.5, 3.5)], [(1, 1), (2, 1), (2, 2)]
    apart = [(-3.25, -2), (-3, -2), (-3, -1)]
    line = [(0, 0), (5, 5)]
    rings = rings_of(
        *[(square, False), (hole, True), (apart, False), (square, False), (apart, False)],
        (line, False),
        polygon=[3, 3, 5, 6, 6, 9],
    )
    whole = grid.polygon_areas(rings)
    area = np.bincount(whole.polygon, whole.area, 10)
    np.testing.assert_allclose(area, [0, 0, 0, 8.5, 0, 0.125, 9.125, 0, 0, 0])
    np.testing.assert_allclose(grid.polygon_moments(rings, 10)[0], area)
    assert set(whole.row[whole.polygon == 5]) == {-2}
    assert set(whole.col[whole.polygon == 5]) == {-4}
    monkeypatch.setattr(grid, "MAX_SQUARES", 1)
    for one, other in zip(whole, grid.polygon_areas(rings), strict=True):
        np.testing.assert_array_equal(one, other)
    none = grid.Rings(*(np.empty(0, int),) * 3, np.empty((0, 2)))
    assert not len(grid.polygon_areas(none).area)


# ----- distances -----
def test_distance_of_the_nearest_and_of_the_second_nearest_by_hand():
    places = np.array([[0, 0], [0, 1], [0, 3], [0, 7.0]])  # nearest 1, 1, 2, 4; second 3, 2, 3, 6
    assert grid.neighbour_distance(places) == 1.5
    assert grid.lattice_pitch(places) == grid.neighbour_distance(places, rank=2) == 3
    assert grid.lattice_pitch(places[:2]) == 1  # there is no second one
    assert np.isnan(grid.lattice_pitch(places[:1]))


def test_the_pitch_of_a_jittered_square_lattice_is_that_of_the_lattice():
    places = 100.0 * np.argwhere(np.ones((20, 30)))
    places += np.random.default_rng(0).normal(0, 5, places.shape)
    assert grid.lattice_pitch(places) == pytest.approx(100, rel=0.02)
    assert grid.neighbour_distance(places) < 0.95 * 100
