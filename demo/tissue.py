"""Grow the tissue of a simulated section: compartments, and the cells that live in them.

Smooth random fields and warped circles divide the plane into nests of tumour in fibrous stroma,
glands with lumen, lymphoid aggregates, fat and vessels; a tear runs in from the edge. Cells are
points drawn with the density of their compartment and relaxed to an even spacing (Lloyd's
iteration); each is the seed of one Voronoi cell and gets a type by its compartment. Positions are
x, y in um, grids have one value per um2.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

REFERENCE_UM = 1792.0  # side of a section with all structures at full size and number
LLOYD_STEPS = 4

# Compartments, and their cells per mm2.
GLASS, STROMA, TUMOUR, GLAND, LUMEN, LYMPHOID, FAT, VESSEL, BLOOD = range(9)
COMPARTMENTS = ("", "stroma", "tumour", "gland", "lumen", "lymphoid", "fat", "vessel", "blood")
DENSITY = np.array([0, 1700, 5600, 8500, 0, 15500, 230, 8000, 6500], float)

# Cell types: RNA relative to a tumour cell; nucleus (long and short axis in um, spread of both,
# haematoxylin density, share with a nucleolus). The red cell has no nucleus and no RNA.
TYPES = (
    "tumour", "gland", "fibroblast", "bcell", "tcell", "macrophage", "endothelial", "fat", "red",
)  # fmt: skip
CELL_TYPES = pd.DataFrame(
    {
        "rna": [1.0, 0.8, 0.5, 0.35, 0.33, 0.8, 0.45, 0.6, 0.0],
        "long": [9.6, 8.2, 14.0, 6.3, 6.2, 8.0, 11.0, 8.0, 6.8],
        "short": [7.6, 5.8, 3.3, 5.7, 5.7, 5.8, 2.8, 2.2, 6.0],
        "spread": [0.17, 0.10, 0.20, 0.07, 0.07, 0.13, 0.18, 0.15, 0.06],
        "stain": [0.78, 0.90, 0.95, 1.30, 1.30, 0.75, 1.00, 1.05, 0.80],
        "nucleolus": [0.6, 0.15, 0.1, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0],
        "scatter": [4.0, 3.6, 4.5, 2.6, 2.6, 4.2, 3.5, 8.0, 1.0],  # um, sd of its molecules
    },
    index=TYPES,
)
MIX = {  # types of the cells of a compartment
    STROMA: {
        "fibroblast": 0.72, "tcell": 0.12, "macrophage": 0.10, "bcell": 0.03, "endothelial": 0.03,
    },
    TUMOUR: {"tumour": 0.93, "tcell": 0.04, "macrophage": 0.03},
    GLAND: {"gland": 0.96, "tcell": 0.04},
    LYMPHOID: {"tcell": 0.66, "bcell": 0.22, "macrophage": 0.08, "endothelial": 0.04},
    FAT: {"fat": 1.0},
    VESSEL: {"endothelial": 1.0},
    BLOOD: {"red": 1.0},
}  # fmt: skip
FOLLICLE_MIX = {"bcell": 0.86, "tcell": 0.10, "macrophage": 0.04}  # of a lymphoid aggregate's core
FOLLICLE_DEPTH_UM = 38.0


# --------------------------------------------------------------------------------------------------
# compartments
# --------------------------------------------------------------------------------------------------
@dataclass
class Layout:
    """Compartment of every um2, and the fields (float32, same shape) that vary over the section."""

    compartment: np.ndarray  # uint8 (S, S)
    fields: dict[str, np.ndarray]

    def at(self, name: str, xy: np.ndarray) -> np.ndarray:
        """A field, or the compartment, at positions (N, 2) in um."""
        grid = self.compartment if name == "compartment" else self.fields[name]
        col, row = xy.astype(int).clip(0, len(grid) - 1).T
        return grid[row, col]

    def main_compartments(self, grid: int) -> np.ndarray:
        """The compartment uint8 (grid, grid) that fills most of each superpixel."""
        step = len(self.compartment) // grid
        cells = self.compartment.reshape(grid, step, grid, step)
        share = [(cells == c).mean((1, 3)) for c in range(len(COMPARTMENTS))]
        return np.argmax(share, axis=0).astype(np.uint8)


def smooth_field(side: int, scale_um: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian random field (side, side) of mean 0 and sd 1 that varies over about ``scale_um``.

    White noise is smoothed on a grid of a quarter of the scale, then enlarged: fast, and enough.
    """
    knot_um = max(int(scale_um / 4), 1)
    n, sd = side // knot_um + 20, 1.4
    coarse = gaussian_filter(rng.standard_normal((n, n)), sd) * 2 * sd * np.sqrt(np.pi)
    field = cv2.resize(coarse, (n * knot_um, n * knot_um), interpolation=cv2.INTER_CUBIC)
    start = 8 * knot_um
    return field[start : start + side, start : start + side].astype(np.float32)


def distance_to_circles(
    x: np.ndarray, y: np.ndarray, centres: np.ndarray, radii: np.ndarray
) -> np.ndarray:
    """Signed distance in um to the nearest circle, negative inside."""
    distance = np.full(x.shape, 1e4, np.float32)
    for (cx, cy), radius in zip(centres, radii, strict=True):
        np.minimum(distance, np.hypot(x - cx, y - cy) - radius, out=distance)
    return distance


def spaced_points(
    n: int, low: list[float], high: list[float], spacing: float, rng: np.random.Generator
) -> np.ndarray:
    """Up to ``n`` random points (M, 2) between two corners, no two closer than ``spacing``."""
    points = np.empty((0, 2))
    for point in rng.uniform(low, high, (20 * n, 2)):
        if len(points) < n and (np.hypot(*(points - point).T) > spacing).all():
            points = np.vstack([points, point])
    return points


def make_layout(size_um: float, rng: np.random.Generator) -> Layout:
    """Later compartments lie upon earlier ones; the glass (outside, tear) is put on last."""
    side = int(size_um)
    y, x = np.mgrid[:side, :side].astype(np.float32) + 0.5
    warp_x, warp_y = (7 * smooth_field(side, 30, rng) for _ in range(2))
    # tumour in the left half, glands and fat in the right one
    tumourness = smooth_field(side, 100, rng) + 0.3 * smooth_field(side, 40, rng)
    tumourness += np.clip((0.60 - x / size_um) * 6, -6, 0.45)
    compartment = np.full((side, side), STROMA, np.uint8)
    compartment[tumourness > 0.15] = TUMOUR
    corner = np.hypot(x - size_um, y - size_um) + 45 * smooth_field(side, 120, rng)
    compartment[corner < 0.37 * size_um] = FAT
    area = (size_um / REFERENCE_UM) ** 2
    low, high = [0.66 * size_um, 0.1 * size_um], [0.95 * size_um, 0.6 * size_um]
    acini = spaced_points(round(46 * area) + 1, low, high, 88, rng)
    gland = distance_to_circles(x + warp_x, y + warp_y, acini, rng.uniform(26, 46, len(acini)))
    compartment[(gland < 30) & (compartment == TUMOUR)] = STROMA
    compartment[gland < 0] = GLAND
    compartment[gland < -rng.uniform(15, 17)] = LUMEN
    follicles = np.array([[0.56, 0.22], [0.50, 0.60], [0.25, 0.80], [0.60, 0.84]]) * size_um
    radii = np.array([125.0, 95.0, 80.0, 60.0]) * min(1.0, size_um / REFERENCE_UM * 1.5)
    aggregate = distance_to_circles(x + 2.5 * warp_x, y + 2.5 * warp_y, follicles, radii)
    compartment[aggregate < 0] = LYMPHOID
    stems = spaced_points(round(75 * area) + 1, [0, 0], [size_um, size_um], 70, rng)
    radii = rng.uniform(5, 10, len(stems)) + (rng.random(len(stems)) < 0.2) * rng.uniform(6, 22)
    vessel = distance_to_circles(x + 1.5 * warp_x, y + 0.6 * warp_y, stems, radii)
    in_stroma = np.isin(compartment, [STROMA, FAT, LYMPHOID])
    compartment[in_stroma & (vessel < 3)] = VESSEL
    compartment[in_stroma & (vessel < 0)] = BLOOD
    # outline: a warped super-ellipse; tear: a crack that runs in from the lower edge
    u, v = x / size_um - 0.5, y / size_um - 0.5
    outline = (np.abs(u) ** 2.6 + np.abs(v) ** 2.6) ** (1 / 2.6)
    outline = outline + 0.012 * smooth_field(side, 190, rng)
    outline += 0.0022 * smooth_field(side, 22, rng)
    crack = (x - 0.40 * size_um) + 0.25 * (y - size_um)
    crack = crack + 14 * smooth_field(side, 110, rng) + warp_x / 2
    width = (y - 0.64 * size_um) * 0.10
    glass = (outline > 0.462) | (np.abs(crack) < width)
    compartment[glass] = GLASS

    nest = (compartment == TUMOUR).astype(np.uint8)
    inside, outside = (cv2.distanceTransform(m, cv2.DIST_L2, 5) for m in (nest, 1 - nest))
    # fibres run across the section, but around the nests and the glands
    obstacle = np.minimum(outside, np.maximum(gland, 0))
    wrapped = 0.75 * (y + 0.5 * x) + 60 * (1 - np.exp(-cv2.GaussianBlur(obstacle, (0, 0), 6) / 45))
    clone = 1 / (1 + np.exp(-5 * smooth_field(side, 260, rng)))
    fields = {
        "depth in nest": 1 - np.exp(-((inside / 38) ** 2)),
        "near nest": np.exp(-outside / 35),
        "nest border": inside - outside,
        "clone": clone,
        "other clone": 1 - clone,
        "interferon": 1 / (1 + np.exp(-6 * (smooth_field(side, 230, rng) - 0.9))),
        "zone": np.clip((0.3 * x + 0.7 * y) / size_um, 0, 1) ** 1.5,
        "gland": gland,
        "vessel": vessel,
        "aggregate": aggregate,
        "fibre": wrapped + 60 * smooth_field(side, 240, rng) + 9 * smooth_field(side, 60, rng),
    }
    return Layout(compartment, fields)


# --------------------------------------------------------------------------------------------------
# cells
# --------------------------------------------------------------------------------------------------
def place_cells(layout: Layout, rng: np.random.Generator) -> pd.DataFrame:
    """Cells with seed (x, y) and nucleus (nx, ny) in um, type, compartment, long axis (radians)."""
    density = DENSITY[layout.compartment] * 1e-6  # per um2
    crowded = np.exp(-np.clip(layout.fields["aggregate"], 0, None) / 30)
    density = density * np.where(layout.compartment == STROMA, 1 + 2.5 * crowded, 1.0)
    rows, cols = np.nonzero(density)
    weight = density[rows, cols]
    places = np.column_stack([cols, rows]) + 0.5
    xy = places[rng.choice(len(places), rng.poisson(weight.sum()), p=weight / weight.sum())]
    xy = xy + rng.uniform(-0.5, 0.5, xy.shape)
    part = np.arange(0, len(places), 3)  # a third of the grid is enough to find a centre
    for _ in range(LLOYD_STEPS):
        owner = cKDTree(xy).query(places[part])[1]
        mass = np.bincount(owner, weight[part], len(xy))
        for axis in range(2):
            moment = np.bincount(owner, weight[part] * places[part, axis], len(xy))
            xy[mass > 0, axis] = (moment / np.where(mass > 0, mass, 1))[mass > 0]
    xy += rng.normal(0, 0.6, xy.shape)
    xy = xy[layout.at("compartment", xy) != GLASS]
    cells = pd.DataFrame(xy, columns=["x", "y"])
    cells["compartment"] = layout.at("compartment", xy)
    cells = cells[~cells.compartment.isin([GLASS, LUMEN])].reset_index(drop=True)
    xy = cells[["x", "y"]].to_numpy()

    chance = rng.random(len(cells))
    cells["type"] = ""
    core = layout.at("aggregate", xy) < -FOLLICLE_DEPTH_UM
    groups = [(cells.compartment == c, mix) for c, mix in MIX.items()]
    groups.append(((cells.compartment == LYMPHOID) & core, FOLLICLE_MIX))
    for chosen, mix in groups:
        edges = np.cumsum(list(mix.values()))
        index = np.searchsorted(edges / edges[-1], chance[chosen])
        cells.loc[chosen, "type"] = np.array(list(mix))[index]

    # a fat cell is all vacuole: its nucleus lies on the membrane, half way to the next cell
    neighbour = xy[cKDTree(xy).query(xy, k=2)[1][:, 1]]
    fat = (cells.type == "fat").to_numpy()[:, None]
    cells[["nx", "ny"]] = np.where(fat, xy + 0.48 * (neighbour - xy), xy)
    cells["angle"] = nuclear_angles(layout, cells, neighbour - xy, rng)
    return cells


def nuclear_angles(
    layout: Layout, cells: pd.DataFrame, to_neighbour: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Long axis of each nucleus: along fibres, around a vessel, across an epithelium, or any."""
    xy = cells[["x", "y"]].to_numpy()
    right, down = np.array([3.0, 0.0]), np.array([0.0, 3.0])
    slope = {
        name: np.arctan2(layout.at(name, xy + down) - layout.at(name, xy - down),
                         layout.at(name, xy + right) - layout.at(name, xy - right))
        for name in ("fibre", "gland", "vessel")
    }  # fmt: skip
    angle = rng.uniform(0, np.pi, len(cells))
    along = cells.type.isin(["fibroblast", "endothelial"]) & (cells.compartment != VESSEL)
    for chosen, direction, spread in (
        (along, slope["fibre"] + np.pi / 2, 0.25),
        (cells.compartment == VESSEL, slope["vessel"] + np.pi / 2, 0.1),
        (cells.type == "gland", slope["gland"], 0.25),
        (cells.type == "fat", np.arctan2(to_neighbour[:, 1], to_neighbour[:, 0]) + np.pi / 2, 0.1),
    ):
        angle[chosen] = (direction + rng.normal(0, spread, len(cells)))[chosen]
    return angle
