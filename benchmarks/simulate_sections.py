"""Simulate sections for benchmarks/accuracy.py that differ in kind from the demo's section.

    python benchmarks/simulate_sections.py --directory data/simulated-0 --seed 0

Cells are placed and stained with demo/, the rest is another world, so that what was tuned on the
demo gains nothing here:

1. Tissue. Three designs take turns (seed modulo 3): gut mucosa (crypts in rows above a wall),
   liver-like lobules (zones around veins, bile ducts at the borders), a labyrinth of tumour cords.
   Sections are oblong; density, stain, pixel size, lattice (hexagonal or square, turned by some
   degrees), pitch and spot radius differ as well.
2. Expression. No marker programs: the logarithm of a gene's rate in a cell is a sum of random
   loadings. Kind "histology" loads on what the image shows (type of the cell, crowding, distance
   from the nearest border of an epithelium); "field" on smooth random fields and the design's
   hidden zonation, which no stain shows; "both" on the type, and on a field in some types only;
   "noise" on nothing.
3. Counts. Every cell bursts: a gamma factor per gene and cell, of a shape drawn per gene, makes
   counts over-dispersed (negative binomial). Spots catch molecules with unequal efficiency.

Reads   nothing; --seed decides everything.
Writes  the files of demo/simulate.py, with the same content. ``mean`` in truth.npz is the
        expectation before the bursts, which nobody can predict: its correlation with the counts is
        a ceiling that a predictor could reach.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks.measure import run_benchmark
from reading import cli

SCRIPT = "benchmarks/simulate_sections.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--directory", type=cli.sample_directory, required=True, help="Folder to write.")
    option("--seed", type=cli.not_negative, default=0,
           help="Another seed is another section; seed modulo 3 chooses the design.")  # fmt: skip
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from scipy.spatial import cKDTree

from demo.simulate import bin_molecules, catch, expected_counts, scatter_molecules
from demo.stain import PIXEL_UM, stain_densities
from demo.tissue import (
    BLOOD,
    CELL_TYPES,
    COMPARTMENTS,
    FAT,
    GLAND,
    GLASS,
    LUMEN,
    LYMPHOID,
    STROMA,
    TUMOUR,
    TYPES,
    VESSEL,
    Layout,
    distance_to_circles,
    place_cells,
    smooth_field,
    spaced_points,
)

Rng = np.random.Generator
Size = tuple[int, int]  # rows, columns in um
Grid = np.ndarray  # (S, S), of points 1 um apart


@dataclass(frozen=True)
class Design:
    """One kind of section. Sides in um are multiples of 16, and whole pixels at ``pixel_um``."""

    tissue: str  # a key of LAYOUTS
    size_um: tuple[int, int]  # rows, columns
    square: bool  # lattice: square, else hexagonal
    pitch_um: float
    radius_um: float
    turn_deg: float  # of the lattice
    pixel_um: float  # of he-raw
    molecules_per_cell: float  # of the panel
    capture: float  # mean share of the molecules under a spot that are counted


DESIGNS = (
    Design("mucosa", (1600, 1920), False, 100.0, 27.5, 6.0, 0.5, 150.0, 0.5),
    Design("lobules", (1728, 1536), True, 120.0, 35.0, -9.0, 0.64, 90.0, 0.35),
    Design("cords", (1472, 1728), False, 85.0, 25.0, 0.0, 0.32, 220.0, 0.7),
)
GENES = {"histology": 32, "field": 16, "both": 24, "noise": 6}
N_FIELDS, FIELD_SCALES_UM = 5, (130.0, 450.0)  # shortest and longest scale, a little over a pitch
ABUNDANCE_SD = 0.9  # sd of the log mean of a gene
BURST_SHAPE, BURST_SHAPE_SD = 1.2, 0.5  # median gamma shape of a gene, sd of its logarithm
EFFICIENCY_SD = 0.25  # sd of the log efficiency between spots
AMBIENT_SHARE = 0.08  # share of a gene's molecules that float free, anywhere in the tissue
MIN_SPOT_TISSUE = 0.6  # share of a spot's disc that must lie in tissue
CROWD_UM, BORDER_UM = 25.0, 40.0  # reach of crowding; distance at which a border is forgotten
MAX_LOG_FOLD = 2.5  # a gene's rate varies no more than e to this power around its median
# Optical density per unit of stain in red, green, blue: the demo's are (0.92, 1.14, 0.55) and
# (0.17, 0.80, 0.37); sections vary around other scanners' colours.
HAEMATOXYLIN_RGB, EOSIN_RGB = np.array([1.05, 0.98, 0.42]), np.array([0.10, 0.92, 0.58])


# --------------------------------------------------------------------------------------------------
# tissue
# --------------------------------------------------------------------------------------------------
def signed_distance(inside: np.ndarray) -> np.ndarray:
    """Distance in um from the border of a region (S, S), negative inside of it."""
    inner, outer = (
        cv2.distanceTransform(m.astype(np.uint8), cv2.DIST_L2, 5) for m in (inside, ~inside)
    )
    return (outer - inner).clip(-1e4, 1e4)


def mucosa(x: Grid, y: Grid, size: Size, rng: Rng) -> tuple[Grid, Grid]:
    """Crypts that stand in rows on a muscular wall; the hidden zone is the crypts' own axis."""
    side = len(x)
    rows = size[0]
    depth = (y + 18 * smooth_field(side, 260, rng)) / rows  # 0 at the upper edge, 1 at the lower
    across = x + 10 * smooth_field(side, 120, rng) + 0.12 * y
    spacing, shift = rng.uniform(72, 84), 14 * smooth_field(side, 500, rng)
    axis = np.abs((across + shift) % spacing - spacing / 2)
    bottom = 0.50 + 0.02 * smooth_field(side, 70, rng)
    crypt = (axis < 24) & (depth < bottom)
    compartment = np.full((side, side), STROMA, np.uint8)
    compartment[crypt] = GLAND
    compartment[crypt & (axis < 7.5)] = LUMEN
    fat = smooth_field(side, 150, rng) + 0.3 * smooth_field(side, 45, rng)
    compartment[(depth > 0.58) & (depth < 0.78) & (fat > 0.7)] = FAT
    compartment[(depth > 0.80) & (smooth_field(side, 55, rng) > 0.35)] = TUMOUR  # muscle bundles
    centres = np.column_stack([rng.uniform(0.1, 0.9, 4) * size[1], rng.uniform(0.5, 0.6, 4) * rows])
    follicle = distance_to_circles(x, y, centres, rng.uniform(55, 120, 4))
    compartment[follicle + 8 * smooth_field(side, 40, rng) < 0] = LYMPHOID
    compartment[(depth < 0.06) | (depth > 0.96)] = GLASS
    return compartment, np.clip(depth / 0.5, 0, 1)


def lobules(x: Grid, y: Grid, size: Size, rng: Rng) -> tuple[Grid, Grid]:
    """Lobules around central veins; the hidden zone runs from the vein to the lobule's border."""
    side = len(x)
    veins = spaced_points(400, [-150, -150], [size[1] + 150, size[0] + 150], 290, rng)
    warped = [grid + 22 * smooth_field(side, 130, rng) for grid in (x, y)]
    places = np.column_stack([grid.ravel() for grid in warped])
    near, _ = cKDTree(veins).query(places, k=3)
    to_vein, to_border, to_corner = near[:, 0], near[:, 1] - near[:, 0], near[:, 2] - near[:, 0]
    to_vein, to_border, to_corner = (d.reshape(side, side) for d in (to_vein, to_border, to_corner))
    compartment = np.full((side, side), TUMOUR, np.uint8)  # hepatocytes look like it
    compartment[smooth_field(side, 14, rng) > 1.15] = BLOOD  # sinusoids
    fatty = (smooth_field(side, 300, rng) > 0.5) & (smooth_field(side, 30, rng) > 0.4)
    compartment[fatty & (to_vein < 110)] = FAT
    tract = (to_corner < 75) | ((to_border < 12) & (smooth_field(side, 200, rng) > 0.2))
    compartment[tract] = STROMA
    inflamed = smooth_field(side, 35, rng) + 0.8 * smooth_field(side, 400, rng)
    compartment[tract & (inflamed > 1.0)] = LYMPHOID
    ducts = spaced_points(500, [0, 0], [size[1], size[0]], 34, rng)
    far, nearest = cKDTree(ducts).query(np.column_stack([x.ravel(), y.ravel()]))
    duct = (far - rng.uniform(11, 19, len(ducts))[nearest]).reshape(side, side)
    compartment[tract & (duct < 0)] = GLAND
    compartment[tract & (duct < -8)] = LUMEN
    wall = to_vein - rng.uniform(14, 24)
    compartment[wall < 4] = VESSEL
    compartment[wall < 0] = BLOOD
    edge = np.minimum.reduce([x, y, size[1] - x, size[0] - y]) + 25 * smooth_field(side, 150, rng)
    compartment[edge < 45] = GLASS
    return compartment, to_vein / (to_vein + to_border / 2 + 1)


def cords(x: Grid, y: Grid, size: Size, rng: Rng) -> tuple[Grid, Grid]:
    """A labyrinth of tumour cords in fibrous stroma; the hidden zone is a broad front across it."""
    side = len(x)
    wave = 3.4 * smooth_field(side, 260, rng) + (0.6 * x + 0.8 * y) / rng.uniform(24, 30)
    cord = np.sin(wave) + 0.35 * smooth_field(side, 30, rng)
    compartment = np.full((side, side), STROMA, np.uint8)
    compartment[cord > 0.15 + 0.5 * smooth_field(side, 330, rng)] = TUMOUR
    inflamed = smooth_field(side, 60, rng) + 0.6 * smooth_field(side, 300, rng)
    compartment[(compartment == STROMA) & (inflamed > 1.3)] = LYMPHOID
    compartment[(compartment == TUMOUR) & (smooth_field(side, 45, rng) > 2.0)] = LUMEN  # cysts
    stems = spaced_points(60, [0, 0], [size[1], size[0]], 120, rng)
    vessel = distance_to_circles(x, y, stems, rng.uniform(5, 22, len(stems)))
    compartment[(compartment == STROMA) & (vessel < 4)] = VESSEL
    compartment[(compartment == VESSEL) & (vessel < 0)] = BLOOD
    ellipse = ((x / size[1] - 0.5) / 0.47) ** 2 + ((y / size[0] - 0.5) / 0.47) ** 2
    compartment[ellipse + 0.1 * smooth_field(side, 200, rng) > 1] = GLASS
    front = (x / size[1] - 0.5) * 5 + 0.6 * smooth_field(side, 350, rng)
    return compartment, 1 / (1 + np.exp(-front))


LAYOUTS = {"mucosa": mucosa, "lobules": lobules, "cords": cords}


def make_layout(design: Design, rng: Rng) -> Layout:
    """Compartments and fields on a square that holds the section; beyond it lies glass.

    ``visible border`` and the fields that demo/ asks for follow the compartments; ``hidden 0`` is
    the design's zonation, ``hidden 1...`` are random fields: mean 0 and sd 1 within the tissue.
    """
    side = max(design.size_um)
    y, x = np.mgrid[:side, :side].astype(np.float32) + 0.5
    compartment, zone = LAYOUTS[design.tissue](x, y, design.size_um, rng)
    compartment[design.size_um[0] :], compartment[:, design.size_um[1] :] = GLASS, GLASS
    fields = {
        "gland": signed_distance(np.isin(compartment, [GLAND, LUMEN])),
        "vessel": signed_distance(np.isin(compartment, [VESSEL, BLOOD])),
        "aggregate": signed_distance(compartment == LYMPHOID),
        "nest border": -signed_distance(compartment == TUMOUR),
        "fibre": 0.9 * x - 0.4 * y + 90 * smooth_field(side, 200, rng),
        "visible border": np.tanh(
            signed_distance(np.isin(compartment, [GLAND, TUMOUR])) / BORDER_UM
        ),
    }
    shortest, longest = np.log(FIELD_SCALES_UM)
    scales = np.exp(rng.uniform(shortest, longest, N_FIELDS - 1))
    inside = compartment != GLASS
    for i, field in enumerate([zone, *(smooth_field(side, scale, rng) for scale in scales)]):
        fields[f"hidden {i}"] = (field - field[inside].mean()) / field[inside].std()
    return Layout(compartment, fields)


def thin_cells(layout: Layout, cells: pd.DataFrame, rng: Rng) -> pd.DataFrame:
    """Fewer cells in some regions, and in others other cells than demo/ would put there."""
    xy = cells[["x", "y"]].to_numpy()
    side = len(layout.compartment)
    fields = {name: smooth_field(side, 220, rng) for name in ("thin", "swap")}
    grids = Layout(layout.compartment, fields)
    keep = rng.random(len(cells)) < 0.85 + 0.12 * np.tanh(grids.at("thin", xy))
    swap = rng.random(len(cells)) < 0.15 * (1 + np.tanh(2 * grids.at("swap", xy)))
    cells.loc[swap & (cells.type == "fibroblast"), "type"] = "macrophage"
    cells.loc[swap & (cells.type == "bcell"), "type"] = "tcell"
    return cells[keep].reset_index(drop=True)


def stain(layout: Layout, cells: pd.DataFrame, design: Design, rng: Rng) -> np.ndarray:
    """The H&E image, uint8 (rows, columns, 3), at the pixel size of the design."""
    eosin, haematoxylin = stain_densities(layout, cells, rng)
    side = len(eosin)
    thickness = np.exp(0.1 * smooth_field(side, 600 / PIXEL_UM, rng))
    colour = np.exp(rng.normal(0, 0.08, (2, 3))) * [HAEMATOXYLIN_RGB, EOSIN_RGB]
    colour = colour.astype(np.float32)
    strength = rng.uniform(0.7, 1.15, 2).astype(np.float32)
    density = (strength[0] * haematoxylin * thickness)[..., None] * colour[0]
    density += (strength[1] * eosin * thickness)[..., None] * colour[1]
    light = rng.uniform(236, 250, 3).astype(np.float32) * np.exp(-density)
    light = cv2.GaussianBlur(light, (0, 0), rng.uniform(0.7, 1.3))
    rows, cols = (round(s / PIXEL_UM) for s in design.size_um)
    shape = tuple(round(s / design.pixel_um) for s in design.size_um[::-1])
    shrinks = design.pixel_um > PIXEL_UM
    light = cv2.resize(
        light[:rows, :cols], shape, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    light += rng.uniform(1.5, 3.5) * rng.standard_normal(light.shape, np.float32)
    return light.clip(0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------------
# expression
# --------------------------------------------------------------------------------------------------
def gene_table() -> pd.DataFrame:
    """Index = gene, column kind."""
    kinds = [kind for kind, n in GENES.items() for _ in range(n)]
    names = [f"{kind.upper()}{i + 1}" for kind, n in GENES.items() for i in range(n)]
    return pd.DataFrame({"kind": kinds}, index=pd.Index(names, name="gene"))


def log_folds(layout: Layout, cells: pd.DataFrame, kinds: np.ndarray, rng: Rng) -> np.ndarray:
    """Logarithm of each gene's rate in each cell (cells, genes), up to a constant per gene."""
    xy = cells[["nx", "ny"]].to_numpy()
    types = (cells.type.to_numpy()[:, None] == np.array(TYPES)).astype(np.float32)
    crowd = cKDTree(xy).query_ball_point(xy, CROWD_UM, return_length=True)
    seen = np.column_stack([np.log(crowd), layout.at("visible border", xy)])
    seen = (seen - seen.mean(0)) / seen.std(0)
    hidden = np.column_stack([layout.at(f"hidden {i}", xy) for i in range(N_FIELDS)])
    n = len(kinds)
    by_type = types @ rng.normal(0, 1.1, (len(TYPES), n))
    by_sight = by_type + seen @ rng.normal(0, 0.5, (2, n))
    loading = rng.normal(0, 0.9, (N_FIELDS, n)) * (rng.random((N_FIELDS, n)) < 0.5)
    loading[rng.integers(N_FIELDS, size=n), np.arange(n)] = rng.choice([-0.9, 0.9], n)
    by_field = hidden @ loading
    responds = types @ (rng.random((len(TYPES), n)) < 0.6)
    fold = np.select(
        [kinds == "histology", kinds == "field", kinds == "both"],
        [by_sight, by_field, by_type + responds * by_field],
        0.0,
    )
    return (fold - np.median(fold, axis=0)).clip(-MAX_LOG_FOLD, MAX_LOG_FOLD)


def expression_rates(
    layout: Layout, cells: pd.DataFrame, genes: pd.DataFrame, molecules: float, rng: Rng
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expected molecules (cells, genes); the same with bursts; ambient molecules (genes,)."""
    rates = np.exp(log_folds(layout, cells, genes.kind.to_numpy(), rng))
    rates *= CELL_TYPES.rna[cells.type].to_numpy()[:, None] ** 0.5
    rates /= rates.mean(0)
    rates *= rng.lognormal(0, ABUNDANCE_SD, len(genes))
    rates *= molecules * len(cells) / rates.sum()
    ambient = AMBIENT_SHARE * rates.sum(0)
    rates *= 1 - AMBIENT_SHARE
    noise = (genes.kind == "noise").to_numpy()
    ambient[noise] += rates[:, noise].sum(0)
    rates[:, noise] = 0
    shape = BURST_SHAPE * rng.lognormal(0, BURST_SHAPE_SD, len(genes))
    return rates, rates * rng.gamma(shape, 1 / shape, rates.shape), ambient


# --------------------------------------------------------------------------------------------------
# spots
# --------------------------------------------------------------------------------------------------
def lattice(first: int, end: int, pitch: float, square: bool = False) -> np.ndarray:
    """Points (N, 2), x and y, of the rows and columns from ``first`` to before ``end``.

    (0, 0) is one of them; hexagonal unless ``square``.
    """
    j, i = (index.ravel() for index in np.mgrid[first:end, first:end])
    return np.column_stack([i, j] if square else [i + (j % 2) / 2, j * np.sqrt(0.75)]) * pitch


def spot_lattice(layout: Layout, design: Design) -> np.ndarray:
    """Centres (N, 2), x and y in um, of the spots whose disc lies in the image and on tissue."""
    pitch, radius = design.pitch_um, design.radius_um
    reach = int(2 * max(design.size_um) / pitch)
    points = lattice(-reach, reach + 1, pitch, design.square)
    turn = np.deg2rad(design.turn_deg)
    turned = points @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
    rows, cols = design.size_um
    xy = turned + np.array([cols / 2 + 3.7, rows / 2 - 2.9])  # not on a superpixel's corner
    xy = xy[((xy > radius) & (xy < np.array([cols, rows]) - radius)).all(1)]
    step = np.arange(-int(radius), int(radius) + 1)
    dx, dy = (d.ravel() for d in np.meshgrid(step, step))
    disc = np.column_stack([dx, dy])[np.hypot(dx, dy) <= radius]
    under = layout.at("compartment", (xy[:, None] + disc).reshape(-1, 2)).reshape(len(xy), -1)
    return xy[(under != GLASS).mean(1) >= MIN_SPOT_TISSUE]


# --------------------------------------------------------------------------------------------------
# the files
# --------------------------------------------------------------------------------------------------
def simulate(directory: Path, design: Design, seed: int) -> None:
    """Write the five input files and truth.npz of one section."""
    rng = np.random.default_rng([seed, 2024])  # no seed of the demo gives the same numbers
    layout = make_layout(design, rng)
    cells, genes = thin_cells(layout, place_cells(layout, rng), rng), gene_table()
    expected, rates, ambient = expression_rates(
        layout, cells, genes, design.molecules_per_cell, rng
    )
    xy, gene = scatter_molecules(layout, cells, rates, ambient, rng)
    step, side = int(utils.SUPERPIXEL_UM), max(design.size_um)
    grid = side // step
    share = (layout.compartment != GLASS).reshape(grid, step, grid, step).mean((1, 3))
    spots = spot_lattice(layout, design)
    efficiency = np.minimum(design.capture * np.exp(rng.normal(0, EFFICIENCY_SD, len(spots))), 1)
    caught = catch(xy, gene, spots, efficiency, len(genes), rng, design.radius_um)

    directory.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(stain(layout, cells, design, rng))
    image.save(directory / "he-raw.jpg", quality=88)
    (directory / "pixel-size-raw.txt").write_text(f"{design.pixel_um}\n")
    (directory / "radius-raw.txt").write_text(f"{design.radius_um / design.pixel_um}\n")
    names = [f"S{i:04d}" for i in range(len(spots))]
    locs = pd.DataFrame(spots / design.pixel_um, index=names, columns=["x", "y"])
    locs.to_csv(directory / "locs-raw.csv", float_format="%.2f")
    pd.DataFrame(caught, index=names, columns=genes.index).to_csv(directory / "cnts.csv")
    rows, cols = (s // step for s in design.size_um)
    np.savez_compressed(
        directory / "truth.npz",
        counts=bin_molecules(xy, gene, grid, len(genes))[:rows, :cols],
        mean=expected_counts(cells, expected, ambient, share, grid)[:rows, :cols],
        tissue=share[:rows, :cols] >= 0.5,
        regions=layout.main_compartments(grid)[:rows, :cols],
        region_names=np.array(COMPARTMENTS),
        genes=genes.index.to_numpy(str),
        programs=genes.kind.to_numpy(str),
        kinds=genes.kind.to_numpy(str),
        capture=design.capture,
    )
    print(
        f"simulated {design.tissue}, {design.size_um[0]} x {design.size_um[1]} um: {len(cells):,} "
        f"cells, {len(xy):,} molecules of {len(genes)} genes, {len(spots)} spots of "
        f"{np.median(caught.sum(1)):.0f} counts"
    )


def main(args: argparse.Namespace) -> None:
    simulate(args.directory, DESIGNS[args.seed % len(DESIGNS)], args.seed)


def run(argv: list[str] | None = None) -> int:
    return run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
