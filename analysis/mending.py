"""Mend outlines that cross themselves, so that their areas are exact.

The area of a polygon is a sum over its edges. That holds where no edge crosses or touches another,
holes lie within their outer ring, and no part covers another. Here any outline is cut into pieces
of which that is true: what its outer rings enclose, less what the rings of their holes enclose.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

Ring = tuple[np.ndarray, bool]  # points (n, 2), x and y, and whether it is a hole
EDGES_AT_ONCE = 2**20


class _Edges(NamedTuple):
    """Edges of rings that have a length, ring after ring."""

    start: np.ndarray  # (n, 2)
    end: np.ndarray  # (n, 2)
    ring: np.ndarray  # (n,) to which ring each belongs
    before: np.ndarray  # (n,) number of the edge that it follows
    after: np.ndarray


def _edges(rings: list[np.ndarray]) -> _Edges:
    size = np.array([len(points) for points in rings])
    start = np.concatenate(rings)
    ends = np.cumsum(size)
    following = np.arange(1, len(start) + 1)
    following[ends - 1] = ends - size
    end, ring = start[following], np.repeat(np.arange(len(rings)), size)
    long = (start != end).any(axis=1)
    start, end, ring = start[long], end[long], ring[long]
    number = np.arange(len(ring))
    first = np.searchsorted(ring, ring, side="left")
    last = np.searchsorted(ring, ring, side="right") - 1
    before = np.where(number == first, last, number - 1)
    after = np.where(number == last, first, number + 1)
    return _Edges(start, end, ring, before, after)


def _side(origin: np.ndarray, to: np.ndarray, point: np.ndarray) -> np.ndarray:
    a, b = to - origin, point - origin
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def _meeting_edges(edges: _Edges, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of edges (m,), (m,) of one ``owner`` (n,) that cross or touch, neighbours left out.

    Edges are sorted by their lowest y. An edge is compared with those behind it until one begins
    above its highest y: of ordinary outlines these are few.
    """
    low, high = np.minimum(edges.start, edges.end), np.maximum(edges.start, edges.end)
    order = np.lexsort([low[:, 1], owner])
    found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    first, step = np.arange(len(order)), 0
    while len(first):
        step += 1
        first = first[first + step < len(order)]
        i, j = order[first], order[first + step]
        near = (owner[i] == owner[j]) & (low[j, 1] <= high[i, 1])
        first, i, j = first[near], i[near], j[near]
        meet = (low[j, 0] <= high[i, 0]) & (low[i, 0] <= high[j, 0])
        meet &= (edges.before[i] != j) & (edges.after[i] != j)
        i, j = i[meet], j[meet]
        a, b, c, d = edges.start[i], edges.end[i], edges.start[j], edges.end[j]
        meet = np.sign(_side(a, b, c)) * np.sign(_side(a, b, d)) <= 0
        meet &= np.sign(_side(c, d, a)) * np.sign(_side(c, d, b)) <= 0
        found.append((i[meet], j[meet]))
    one, other = map(np.concatenate, zip(*found, strict=True))
    return one, other


def need_mending(outlines: list[list[Ring]]) -> np.ndarray:
    """Which outlines (n,) may have no exact area as they are: several rings, or rings that meet."""
    several = np.array([len(rings) > 1 for rings in outlines], bool)
    simple = np.flatnonzero(~several)
    size = np.array([len(outlines[i][0][0]) for i in simple], np.int64)
    block = np.cumsum(size) // EDGES_AT_ONCE
    for number in np.unique(block):
        some = simple[block == number]
        edges = _edges([outlines[i][0][0] for i in some])
        one, _ = _meeting_edges(edges, edges.ring)
        several[some[edges.ring[one]]] = True
    return several


def mend(rings: list[Ring]) -> list[Ring]:
    """The same outline as pieces that do not overlap: trapezoids with level upper and lower sides.

    Lines at the height of every vertex and of every crossing cut it into bands, in which edges do
    not cross. An edge that turns around a place once more adds 1 to its winding number, or takes 1;
    a ring encloses the places whose number is not 0.
    """
    edges = _edges([points for points, _ in rings])
    hole = np.array([is_hole for _, is_hole in rings])
    part = np.cumsum(~hole)  # a hole belongs to the outer ring before it
    heights = np.unique(np.concatenate([edges.start[:, 1], _crossing_heights(edges)]))
    low, high = (f(edges.start[:, 1], edges.end[:, 1]) for f in (np.minimum, np.maximum))
    turn = np.sign(edges.end[:, 1] - edges.start[:, 1]).astype(np.int64)
    step = edges.end - edges.start
    pieces: list[Ring] = []
    for top, bottom in itertools.pairwise(heights):
        across = np.flatnonzero((low <= top) & (high >= bottom) & (turn != 0))
        x_start, y_start = edges.start[across].T
        dx, dy = step[across].T
        x = [x_start + (y - y_start) / dy * dx for y in (top, bottom)]
        order = np.argsort(x[0] + x[1], kind="stable")
        inside = _is_inside(edges.ring[across][order], turn[across][order], hole, part)
        for left, right in zip(*_runs(inside), strict=True):
            a, b = order[left], order[right]
            corners = [(x[0][a], top), (x[0][b], top), (x[1][b], bottom), (x[1][a], bottom)]
            pieces.append((np.array(corners), False))
    return pieces


def _crossing_heights(edges: _Edges) -> np.ndarray:
    """y (m,) at which edges cross or touch."""
    i, j = _meeting_edges(edges, np.zeros(len(edges.ring), np.int64))
    a, b, c, d = edges.start[i], edges.end[i], edges.start[j], edges.end[j]
    from_a, from_b = _side(c, d, a), _side(c, d, b)
    differ = from_a != from_b  # else they are parallel
    share = from_a[differ] / (from_a - from_b)[differ]
    y = a[differ, 1] + share * (b - a)[differ, 1]
    return y.clip(np.minimum(a, b)[differ, 1], np.maximum(a, b)[differ, 1])


def _is_inside(
    ring: np.ndarray, turn: np.ndarray, hole: np.ndarray, part: np.ndarray
) -> np.ndarray:
    """Whether what lies right of each edge (n,) is inside, by edges from left to right."""
    if len(hole) == 1:
        return np.cumsum(turn) != 0
    inside = np.zeros(len(ring), bool)
    enclosed = {r: np.cumsum(np.where(ring == r, turn, 0)) != 0 for r in np.unique(ring)}
    for p in {part[r] for r in enclosed}:
        of_part = [r for r in enclosed if part[r] == p]
        outer = np.zeros(len(ring), bool)
        for r in sorted(of_part, key=lambda r: hole[r]):
            outer = outer & ~enclosed[r] if hole[r] else outer | enclosed[r]
        inside |= outer
    return inside


def _runs(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First edge of each run of what is inside, and the edge behind it."""
    change = np.diff(inside.astype(np.int8), prepend=0)
    return np.flatnonzero(change == 1), np.flatnonzero(change == -1)
