"""Spots on a map: the area of their discs, totals over them, and interpolation between them.

Places are (row, column) in superpixels, continuous; the centre of superpixel i lies at i + 0.5.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array
from scipy.spatial import Delaunay, QhullError, cKDTree
from scipy.spatial.distance import cdist

from analysis.scores import pearson
from method.grid import disc_areas

MIN_DISC_TISSUE = 0.25  # as HISTEX.py: from less tissue, a spot's counts tell too little
SUBSAMPLES = 16  # per superpixel and axis: twice as many as HISTEX.py needs


def disc_weights(centres: np.ndarray, radius: float, shape: tuple[int, int]) -> csr_array:
    """Area (spots, rows * columns) of each spot's disc in each superpixel of the map."""
    reach = int(np.ceil(radius)) + 1
    steps = np.arange(-reach, reach + 1)
    corner = np.floor(centres).astype(int)
    row = corner[:, :1] + np.repeat(steps, len(steps))
    col = corner[:, 1:] + np.tile(steps, len(steps))
    area = disc_areas(centres, row, col, radius, SUBSAMPLES)
    on_map = (row >= 0) & (row < shape[0]) & (col >= 0) & (col < shape[1])
    spot, i = np.nonzero((area > 0) & on_map)
    where = (spot, row[spot, i] * shape[1] + col[spot, i])
    size = (len(centres), shape[0] * shape[1])
    return csr_array((area[spot, i].astype(np.float64), where), size)


def sum_discs(weights: csr_array, image: np.ndarray) -> np.ndarray:
    """Totals (spots,) of a map (rows, columns) over the discs; NaN adds nothing."""
    return weights @ np.nan_to_num(image).ravel().astype(np.float64)


def on_tissue(weights: csr_array, image: np.ndarray, radius: float) -> np.ndarray:
    """Whether enough of each disc (spots,) lies on the tissue of a map (rows, columns)."""
    return weights @ np.isfinite(image).ravel() >= MIN_DISC_TISSUE * np.pi * radius**2


def score_totals(predicted: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """r and ratio of sums of totals (spots,) of a gene."""
    total = measured.sum()
    return pearson(predicted, measured), float(predicted.sum() / total) if total else np.nan


def interpolation_weights(centres: np.ndarray, points: np.ndarray) -> tuple[csr_array, csr_array]:
    """Weights (points, spots) of the nearest spot, and of linear interpolation.

    The latter is within the triangles between spots; beyond their hull it is the nearest spot. So
    it is everywhere if there are no triangles.
    """
    shape = (len(points), len(centres))
    every = np.arange(len(points))
    _, nearest = cKDTree(centres).query(points)
    ones = csr_array((np.ones(len(points)), (every, nearest)), shape)
    triangles = triangulate(centres)
    if triangles is None:
        return ones, ones
    found = triangles.find_simplex(points)
    origin = triangles.transform[found, 2]
    two = np.einsum("nij,nj->ni", triangles.transform[found, :2], points - origin)
    shares = np.column_stack([two, 1 - two.sum(1)])
    corners = triangles.simplices[found].astype(np.int64)
    beyond = (found < 0) | np.isnan(shares).any(1)
    shares[beyond], corners[beyond] = (1, 0, 0), nearest[beyond, None]
    linear = csr_array((shares.ravel(), (every.repeat(3), corners.ravel())), shape)
    return ones, linear


def triangulate(centres: np.ndarray) -> Delaunay | None:
    """Triangles between spots; None if these lie on a line."""
    try:
        return Delaunay(centres)
    except (QhullError, ValueError):  # of two spots or one, it is the latter
        return None


def gaussian_weights(centres: np.ndarray, points: np.ndarray, sigma: float) -> np.ndarray:
    """Weights (points, spots) of the spots in a Gaussian mean around every point."""
    exponents = cdist(points, centres, "sqeuclidean") / (-2 * sigma**2)
    exponents -= exponents.max(1, keepdims=True)  # the nearest has a weight however far it is
    weights = np.exp(exponents)
    return weights / weights.sum(1, keepdims=True)


def superpixel_centres(shape: tuple[int, int]) -> np.ndarray:
    """Places (rows * columns, 2)."""
    row, col = np.mgrid[: shape[0], : shape[1]] + 0.5
    return np.column_stack([row.ravel(), col.ravel()])


def interpolate_spots(
    centres: np.ndarray, counts: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest and linear interpolation (rows, columns, genes) of counts (spots, genes)."""
    weights = interpolation_weights(centres, superpixel_centres(shape))
    nearest, linear = ((w @ counts).reshape(*shape, -1) for w in weights)
    return nearest, linear
