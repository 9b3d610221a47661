"""Exact areas that outlines share with the squares of a grid; used by xenium.py.

Coordinates are in sides of a square, so that square (row, col) covers row..row + 1, col..col + 1.
Letters in shapes: V vertices of all outlines.
"""

from __future__ import annotations

import numpy as np

MAX_SQUARES = 2_000_000  # squares of the outlines' bounding boxes held at a time


def outline_shares(
    cell: np.ndarray, xy: np.ndarray, n_cells: int
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Shares of each cell's area in the unit squares that its outline touches, exactly.

    cell (V,) sorted, xy (V, 2) vertices in superpixels. Returns (cell, row, col, share), the shares
    of a cell adding up to 1, and the cells without an outline of any area.
    """
    starts = np.searchsorted(cell, np.arange(n_cells + 1))
    n = np.diff(starts)
    drawn = np.flatnonzero(n >= 3)
    low, high = np.zeros((n_cells, 2), np.int64), np.zeros((n_cells, 2), np.int64)
    if len(drawn):
        low[drawn] = np.floor(np.minimum.reduceat(xy, starts[drawn])).astype(np.int64)
        high[drawn] = np.floor(np.maximum.reduceat(xy, starts[drawn])).astype(np.int64) + 1
    box = (high - low).max(axis=1)
    parts, covered = [], np.zeros(n_cells, bool)
    drawn = drawn[np.argsort(box[drawn], kind="stable")]  # alike ones share a block
    while len(drawn):
        side = box[drawn]
        fits = np.arange(1, len(drawn) + 1) * (side + 1) ** 2 <= MAX_SQUARES
        block, drawn = np.split(drawn, [max(1, int(fits.sum()))])
        vertices = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in block])
        owner = np.repeat(np.arange(len(block)), n[block])
        area = covered_area(owner, xy[vertices] - low[block][owner], len(block), box[block].max())
        total = area.sum((1, 2))
        i, row, col = np.nonzero(area * (total > 1e-9)[:, None, None])
        parts.append(
            (block[i], row + low[block[i], 1], col + low[block[i], 0], area[i, row, col] / total[i])
        )
        covered[block[total > 1e-9]] = True
    columns = (
        tuple(map(np.concatenate, zip(*parts, strict=True))) if parts else (np.empty(0, int),) * 4
    )
    return columns, np.flatnonzero(~covered)


def covered_area(owner: np.ndarray, xy: np.ndarray, n: int, side: int) -> np.ndarray:
    """Area (n, side, side) of polygons within the unit squares, row and column from 0.

    owner (V,) says to which polygon a vertex xy (V, 2) belongs; vertices are in order, closed or
    not. Every edge is cut at the grid lines. A piece that climbs dy within a square covers dy times
    its distance to the right side of the square, and dy of every square further to the right; the
    sum over a closed outline is the area, signed by its sense.
    """
    last = np.flatnonzero(np.r_[owner[1:] != owner[:-1], True])
    following = np.arange(1, len(owner) + 1)
    following[last] = np.r_[0, last[:-1] + 1]
    start, end = xy, xy[following]
    edge, t = cut_at_grid(start, end)
    joined = edge[1:] == edge[:-1]
    a = start[edge] + t[:, None] * (end - start)[edge]
    head, tail = a[:-1][joined], a[1:][joined]
    middle, dy = (head + tail) / 2, tail[:, 1] - head[:, 1]
    col, row = np.clip(np.floor(middle).astype(np.int64), 0, side - 1).T
    area = np.zeros((n, side, side + 1))
    place = (owner[edge[:-1][joined]], row, col)
    np.add.at(area, place, dy * (col + 1 - middle[:, 0]))
    beyond = np.zeros_like(area)
    np.add.at(beyond, (place[0], row, col + 1), dy)
    area = (area + beyond.cumsum(axis=2))[:, :, :side]
    area *= np.sign(area.sum((1, 2)))[:, None, None]
    return np.where(area > 1e-12, area, 0.0)


def cut_at_grid(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where edges (V, 2) meet whole numbers of x or y: (edge, t), t from 0 to 1, in order."""
    edges, ts = [np.repeat(np.arange(len(start)), 2)], [np.tile([0.0, 1.0], len(start))]
    for axis in (0, 1):
        a, b = start[:, axis], end[:, axis]
        low, high = np.floor(np.minimum(a, b)) + 1, np.ceil(np.maximum(a, b))
        n = np.maximum(high - low, 0).astype(np.int64)
        edge = np.repeat(np.arange(len(a)), n)
        line = low[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(n) - n, n)
        edges.append(edge)
        ts.append((line - a[edge]) / (b - a)[edge])
    edge, t = np.concatenate(edges), np.concatenate(ts)
    order = np.lexsort((t, edge))
    return edge[order], t[order]
