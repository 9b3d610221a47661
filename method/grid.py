"""Geometry on the grid of superpixels: areas of discs and of polygons, distances between spots.

Places and vertices are in superpixels, continuous: superpixel (row, col) covers row..row + 1 and
col..col + 1. Letters in shapes: B discs, T superpixels of each, R rings, V vertices, P polygons,
M pairs of a polygon and a superpixel that it touches.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

SUBSAMPLES = 8  # per superpixel and axis, for the area of a disc in it: 64 points
TINY = 1e-9  # of a superpixel's area: what rounding leaves
MAX_SQUARES = 2_000_000  # superpixels of the bounding boxes of polygons held at a time


# --------------------------------------------------------------------------------------------------
# discs
# --------------------------------------------------------------------------------------------------
def disc_areas(
    places: np.ndarray,
    row: np.ndarray,
    col: np.ndarray,
    radius: float,
    subsamples: int = SUBSAMPLES,
) -> np.ndarray:
    """Area (B, T) float32 of the disc around each place (B, 2) in the superpixels row, col (B, T).

    An area is the share of ``subsamples`` x ``subsamples`` points in the superpixel that lie in the
    disc: for 8 or 16 a multiple of 1/64 or 1/256, which float32 holds exactly.
    """
    middles = (np.arange(subsamples) + 0.5) / subsamples
    areas = np.empty(row.shape, np.float32)
    for i, (y, x) in enumerate(places):
        down = (row[i, :, None, None] + middles[:, None] - y) ** 2  # (T, subsamples, 1)
        across = (col[i, :, None, None] + middles - x) ** 2  # (T, 1, subsamples)
        areas[i] = (down + across <= radius**2).mean(axis=(1, 2))
    return areas


def four_moves(place: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """The four whole moves (2,) around a move ``place`` (2,), each with its share of it."""
    whole = np.floor(place).astype(int)
    part = place - whole
    steps = map(np.array, np.ndindex(2, 2))
    return [(whole + step, float(np.abs(1 - step - part).prod())) for step in steps]


# --------------------------------------------------------------------------------------------------
# polygons
# --------------------------------------------------------------------------------------------------
class Rings(NamedTuple):
    """Outlines of polygons: closed rings of vertices, those of a polygon beside each other."""

    polygon: np.ndarray  # (R,) int, ascending: to which polygon a ring belongs
    size: np.ndarray  # (R,) int, vertices of each ring, 1 or more; the first may come again as last
    hole: np.ndarray  # (R,) bool: what it encloses is taken out of the polygon
    xy: np.ndarray  # (V, 2) vertices, x before y, ring after ring

    def part(self, first: int, last: int) -> Rings:
        """The rings first..last - 1."""
        ends = np.cumsum(self.size)
        start, end = ends[first] - self.size[first], ends[last - 1]
        some = slice(first, last)
        return Rings(self.polygon[some], self.size[some], self.hole[some], self.xy[start:end])


class Edges(NamedTuple):
    """Edges of polygons; outer rings run clockwise as seen on the image, holes the other way."""

    polygon: np.ndarray  # (V,)
    start: np.ndarray  # (V, 2)
    end: np.ndarray  # (V, 2)


class Covered(NamedTuple):
    """Areas of polygons in superpixels. One that crosses itself has no exact area."""

    polygon: np.ndarray  # (M,) ascending
    row: np.ndarray  # (M,)
    col: np.ndarray  # (M,)
    area: np.ndarray  # (M,) above 0, at most 1


def edges_of(rings: Rings) -> Edges:
    """The edges of rings, whichever way these run."""
    ring = np.repeat(np.arange(len(rings.size)), rings.size)
    starts = np.cumsum(rings.size) - rings.size
    following = np.arange(1, len(ring) + 1)
    following[starts + rings.size - 1] = starts
    away = rings.xy - rings.xy[starts[ring]]  # so that rounding does not depend on where it lies
    turn = np.add.reduceat(cross(away, away[following]), starts)
    back = ((turn < 0) != rings.hole)[ring, None]
    start, end = rings.xy, rings.xy[following]
    return Edges(rings.polygon[ring], np.where(back, end, start), np.where(back, start, end))


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]


def polygon_moments(rings: Rings, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Area (n,) and centroid (n, 2), x before y, of n polygons, whole and exact."""
    polygon, start, end = edges_of(rings)
    origin = np.zeros((n, 2))
    origin[polygon] = start
    a, b = start - origin[polygon], end - origin[polygon]
    twice = cross(a, b)
    area = np.bincount(polygon, twice, n) / 2
    first = [np.bincount(polygon, twice * (a[:, k] + b[:, k]), n) / 6 for k in (0, 1)]
    return area, origin + np.column_stack(first) / np.where(area > TINY, area, np.inf)[:, None]


def polygon_areas(rings: Rings) -> Covered:
    """Area of every polygon in the superpixels that it touches, exactly; blocks bound the memory.

    Polygons without a ring or without an area occur nowhere in it.
    """
    if not len(rings.size):
        none = np.empty(0, np.int64)
        return Covered(none, none, none, np.empty(0))
    starts = np.cumsum(rings.size) - rings.size
    low, high = (np.floor(f.reduceat(rings.xy, starts)) for f in (np.minimum, np.maximum))
    first = np.flatnonzero(np.diff(rings.polygon, prepend=-1))  # ring of every polygon
    low, high = np.minimum.reduceat(low, first), np.maximum.reduceat(high, first)
    low, high = low.astype(np.int64), high.astype(np.int64)
    block = np.cumsum((high - low + 2).prod(axis=1)) // MAX_SQUARES
    limits = np.append(np.flatnonzero(np.diff(block, prepend=-1)), len(first))
    limits_of_rings = np.append(first, len(rings.size))[limits]
    parts = [
        _areas_in_boxes(rings.part(*some), low[a:b], high[a:b])
        for (a, b), some in zip(pairwise(limits), pairwise(limits_of_rings), strict=True)
    ]
    return Covered(*map(np.concatenate, zip(*parts, strict=True)))


def _areas_in_boxes(rings: Rings, low: np.ndarray, high: np.ndarray) -> Covered:
    """The same of the P polygons of a block. low, high (P, 2) hold their first and last superpixel.

    Edges are cut at the lines of the grid. A piece that goes up by dy covers, on its right, dy of
    every superpixel in its row, and of its own what lies right of the piece; one that goes down
    takes it back. So one cumulative sum along the rows of all boxes gives the areas.
    """
    names, own = np.unique(rings.polygon, return_inverse=True)
    edges = edges_of(rings._replace(polygon=own))
    owner, begin, end = _cut_at_grid(edges.start, edges.end)
    polygon, step = edges.polygon[owner], (edges.end - edges.start)[owner]
    middle = edges.start[owner] + step * ((begin + end) / 2)[:, None]
    dy = step[:, 1] * (end - begin)
    col, row = np.clip(np.floor(middle).astype(np.int64), low[polygon], high[polygon]).T

    left, top = low.T
    width, height = (high - low + 1).T
    width = width + 1  # takes what lies right of a piece
    offset = np.cumsum(width * height) - width * height
    at = offset[polygon] + (row - top[polygon]) * width[polygon] + col - left[polygon]
    beyond = middle[:, 0] - col  # share of the own superpixel that lies left of the piece
    area = np.bincount(at, -dy * (1 - beyond), (width * height).sum())
    area += np.bincount(at + 1, -dy * beyond, len(area))
    area = np.cumsum(area).clip(0, 1)
    found = np.flatnonzero(area > TINY)
    polygon = np.repeat(np.arange(len(names)), width * height)[found]
    row, col = np.divmod(found - offset[polygon], width[polygon])
    return Covered(names[polygon], row + top[polygon], col + left[polygon], area[found])


def _cut_at_grid(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of edges (V, 2) between whole numbers of x or y: edge, from and until, each 0 to 1."""
    low, high = np.minimum(start, end), np.maximum(start, end)
    every = np.arange(len(start))
    cuts, edges = [np.zeros(len(start))], [every]
    for axis in (0, 1):
        first = np.floor(low[:, axis]).astype(np.int64) + 1
        times = (np.floor(high[:, axis]).astype(np.int64) - first + 1).clip(0)
        edge = np.repeat(every, times)
        line = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(times) - times, times)
        cuts.append((line - start[edge, axis]) / (end - start)[edge, axis])
        edges.append(edge)
    cut, edge = np.concatenate(cuts), np.concatenate(edges)
    order = np.lexsort([cut, edge])
    cut, edge = cut[order].clip(0, 1), edge[order]
    until = np.append(cut[1:], 1.0)
    until[np.diff(edge, append=-1) != 0] = 1.0
    return edge, cut, until


# --------------------------------------------------------------------------------------------------
# distances between spots
# --------------------------------------------------------------------------------------------------
def neighbour_distance(places: np.ndarray, rank: int = 1) -> float:
    """Median distance of the places (N, 2) from their nearest one, or from the ``rank``th nearest.

    With fewer neighbours than that it is the farthest; without any it is nan.
    """
    if len(places) < 2:
        return float("nan")
    k = min(rank, len(places) - 1) + 1  # the nearest of all is the place itself
    return float(np.median(cKDTree(places).query(places, k=[k])[0]))


def lattice_pitch(places: np.ndarray) -> float:
    """Pitch of the lattice of the spots (N, 2): the median distance of their second nearest ones.

    On a lattice the nearest is no nearer. Where spots are off it by some um, as in legacy ST, the
    nearest is nearer than the pitch by several per cent.
    """
    return neighbour_distance(places, rank=2)
