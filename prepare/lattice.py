"""Lattices of spots and of bins, and the counts that lie in their discs and in superpixels.

Arrays are (row, col); x (column) and y (row) are continuous, from the left upper edge of the first
pixel or superpixel. Letters in shapes: N positions, S discs, M molecules, h x w superpixels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from method.calibration import calibrated_shape, padded_shape


# -------------------------------------------------------------------------------------------------
# lattices
# -------------------------------------------------------------------------------------------------
@dataclass
class FittedArray:
    """An array of positions, fitted by least squares: xy = origin + lattice_um @ axes."""

    origin: np.ndarray  # (2,) px
    axes: np.ndarray  # (2, 2) px per um: row 0 is the step along the first axis of the lattice
    residual_um: float  # of a position from the fitted array, root mean square

    @property
    def pixel_size_um(self) -> float:
        """um per px, by area: any rotation and flip gives the same."""
        return float(1 / np.sqrt(abs(np.linalg.det(self.axes))))

    @property
    def px_per_um(self) -> np.ndarray:
        """(2,) along the first and the second axis."""
        return np.linalg.norm(self.axes, axis=1)

    @property
    def skew(self) -> float:
        """How far it is from square: the larger of the relative difference of its two scales and
        the cosine of the angle between its axes."""
        along, across = self.px_per_um
        return max(abs(along / across - 1), self.cosine)

    @property
    def cosine(self) -> float:
        return float(abs(self.axes[0] @ self.axes[1]) / self.px_per_um.prod())

    @property
    def mirrored(self) -> bool:
        """True if the array is seen from its back, as it also is where x and y are exchanged."""
        return bool(np.linalg.det(self.axes) < 0)

    def place(self, lattice_um: np.ndarray) -> np.ndarray:
        """(N, 2) px of points of the lattice (N, 2), um."""
        return self.origin + lattice_um @ self.axes


def fit_array(lattice_um: np.ndarray, xy: np.ndarray, path: Path) -> FittedArray:
    """The array whose points ``lattice_um`` (N, 2) lie at ``xy`` (N, 2), px; read from ``path``."""
    design = np.column_stack([np.ones(len(xy)), lattice_um])
    solution, _, rank, _ = np.linalg.lstsq(design, xy, rcond=None)
    if rank < 3 or abs(np.linalg.det(solution[1:])) < 1e-12:
        raise utils.broken(
            path,
            f"has {len(xy)} positions that lie on one line; no lattice can be fitted to them. It "
            f"must hold the positions of the whole array.",
        )
    fitted = FittedArray(solution[0], solution[1:], 0.0)
    off = (fitted.place(lattice_um) - xy) * fitted.pixel_size_um
    fitted.residual_um = float(np.sqrt((off**2).sum(axis=1).mean()))
    return fitted


def mirror_notes(fitted: FittedArray, from_the_back: bool | None = False) -> list[str]:
    """A note if the array lies in the image in a way in which only exchanged x and y would put it.

    On a square image nothing else tells that x and y are exchanged, and all maps are transposed.
    ``from_the_back`` is what is expected: True with CytAssist, which images the array (and Visium
    HD's) from its back; False for slides that carry the tissue; None if the source does not tell.
    """
    if fitted.mirrored == bool(from_the_back):
        return []
    found = {
        True: "not mirrored in the image, as it is with CytAssist",
        False: "mirrored in the image",
        None: "mirrored in the image, as it is with CytAssist only",
    }[from_the_back]
    return [
        f"the array is {found}: unless the image was mirrored, x and y of the positions are "
        f"exchanged, and all maps will be transposed"
    ]


def hexagonal_lattice(box: tuple[float, float, float, float], pitch: float) -> np.ndarray:
    """Centres (N, 2), x and y, of Visium's lattice within (left, top, right, bottom), inclusive.

    Rows are pitch * sqrt(3) / 2 apart and every other row is shifted by half a pitch; the first
    spot lies at (left, top).
    """
    left, top, right, bottom = box
    rows = np.arange(0, np.floor((bottom - top) / (pitch * np.sqrt(3) / 2) + 1e-9) + 1)
    points = []
    for row in rows:
        x = np.arange(left + (row % 2) * pitch / 2, right + 1e-9 * pitch, pitch)
        points.append(np.column_stack([x, np.full(len(x), top + row * pitch * np.sqrt(3) / 2)]))
    return np.concatenate(points) if points else np.empty((0, 2))


def visium_spots(width_um: float, height_um: float) -> np.ndarray:
    """Centres (N, 2), x and y in um, of Visium's spots whose discs lie whole within an area."""
    radius = utils.VISIUM_RADIUS_UM
    box = (radius, radius, width_um - radius, height_um - radius)
    return hexagonal_lattice(box, utils.VISIUM_PITCH_UM)


def named_spots(centres: np.ndarray) -> pd.DataFrame:
    """x, y of pseudo-spots (N, 2), called spot00000, spot00001, ..."""
    return pd.DataFrame(centres, [f"spot{i:05d}" for i in range(len(centres))], ["x", "y"])


# -------------------------------------------------------------------------------------------------
# counts in discs and superpixels
# -------------------------------------------------------------------------------------------------
def disc_of(xy: np.ndarray, centres: np.ndarray, radius: float) -> np.ndarray:
    """Index (M,) of the disc in which a point (M, 2) lies, edge included; -1 for none.

    Discs do not overlap on Visium's lattice, so that every point has one disc at most.
    """
    distance, index = cKDTree(centres).query(xy, k=1, distance_upper_bound=radius * (1 + 1e-12))
    return np.where(np.isfinite(distance), index, -1)


def superpixel_of(xy: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Index row * w + col (...) of the superpixel in which a point (..., 2) lies, x and y in
    superpixels; -1 off the grid of ``shape`` (h, w), and for NaN."""
    col, row = np.floor(xy[..., 0]), np.floor(xy[..., 1])
    inside = (row >= 0) & (row < shape[0]) & (col >= 0) & (col < shape[1])
    return np.where(inside, row * shape[1] + col, -1).astype(np.int64)


def tally(
    row: np.ndarray, column: np.ndarray, shape: tuple[int, int], weight: np.ndarray | None = None
) -> sparse.csr_array:
    """Matrix of a shape that adds up the weights (default 1) at (row, column), each (M,).

    A negative row or column goes nowhere.
    """
    used = (row >= 0) & (column >= 0)
    values = np.ones(used.sum()) if weight is None else weight[used]
    return sparse.csr_array(sparse.coo_array((values, (row[used], column[used])), shape=shape))


def sum_rows(target: np.ndarray, matrix: sparse.csr_array, n: int) -> sparse.csr_array:
    """Rows of a matrix (M, G) added up into (n, G) by their target (M,); -1 goes nowhere."""
    return tally(target, np.arange(len(target)), (n, matrix.shape[0])) @ matrix


def superpixel_grid(
    raw_shape: tuple[int, int], pixel_size_um: float
) -> tuple[tuple[int, int], np.ndarray]:
    """((h, w), factor): superpixels of he.jpg, and superpixels per px of he-raw along x and y.

    These are the sizes and the exact ratios that image_calibration.py uses.
    """
    shape = calibrated_shape(raw_shape, pixel_size_um)
    rows, columns = padded_shape(shape)
    factor = np.array([shape[1] / raw_shape[1], shape[0] / raw_shape[0]]) / utils.TOKEN_PX
    return (rows // utils.TOKEN_PX, columns // utils.TOKEN_PX), factor
