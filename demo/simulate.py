"""Simulate a small H&E section with spots and known truth: a sample's five files, and truth.npz.

    python demo/simulate.py --directory demo/section

The section is an invented carcinoma, built in the order in which nature does it.

1. Compartments and cells (tissue.py): tumour nests, stroma, glands, lymphoid aggregates, fat,
   vessels, a tear; cells of nine types.
2. Rates. Each gene belongs to a program: markers of a cell type, genes of a region or along a
   gradient, housekeeping, cell cycle, pure noise. The rate of a gene in a cell is abundance x
   program x size of the cell x gamma noise. B and T cells look alike in the image, and so do the
   two tumour clones, the interferon niche and the zonation: a good part of the expression cannot
   be read off the histology.
3. Molecules. Poisson draws, scattered around the cell by a Gaussian, and ambient ones anywhere in
   the tissue.
4. Spots. Visium lattice and discs; a spot catches each molecule under it with its own efficiency.
5. H&E (stain.py), painted from the same cells.

Reads   nothing; it makes the folder.
Writes  he-raw.jpg (0.4 um per pixel, so that calibration has work to do), pixel-size-raw.txt,
        radius-raw.txt, locs-raw.csv, cnts.csv, truth.npz, and simulate.json. The truth lies on the
        8 um superpixels of he.jpg before its padding: counts uint16 (rows, columns, genes), all
        molecules; mean float32, their expectation given the cells; tissue bool; regions uint8, the
        compartment of each, and region_names; genes, programs, kinds; capture, the mean share of
        the molecules that a spot catches.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from reading import cli

SCRIPT = "demo/simulate.py"
SIZE_UM = 1792.0  # side of the section's image: 224 superpixels
TRUTH = utils.Artifact(("truth.npz",), None, "all molecules of a section, and their expectation")
WRITTEN = (
    utils.HE_RAW, utils.PIXEL_SIZE_RAW, utils.RADIUS_RAW, utils.LOCS_RAW, utils.CNTS, TRUTH,
)  # fmt: skip


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    option = parser.add_argument
    option("--directory", type=cli.sample_directory, required=True, help="Folder to write.")
    step = utils.SUPERPIXEL_UM
    size = cli.number(float, lambda um: um >= 160 and not um % step, "a multiple of 8 um from 160")
    option("--size-um", type=size, default=SIZE_UM, help="Side of the image in um.")
    option("--seed", type=int, default=1, help="Random seed: each seed gives another section.")
    cli.add_shared(parser)
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import csr_array
from scipy.spatial import cKDTree
from scipy.special import ndtr

from demo.stain import PIXEL_UM, render
from demo.tissue import CELL_TYPES, COMPARTMENTS, GLASS, TYPES, Layout, make_layout, place_cells
from utils import VISIUM_PITCH_UM, VISIUM_RADIUS_UM

CAPTURE = 0.6  # mean share of the molecules under a spot that are counted
DEPTH_SD = 0.15  # sd of the log efficiency between spots
MIN_SPOT_TISSUE = 0.6  # share of a spot's disc that must lie in tissue
MOLECULES_PER_CELL = 120.0  # of the panel, mean over all cells
CELL_NOISE_SHAPE = 4.0  # gamma shape of one gene in one cell: coefficient of variation 0.5
AMBIENT_SHARE = 0.04  # share of a gene's molecules that float free, anywhere in the tissue

# Programs: kind, genes, weight of each cell type, and the field by which the rate varies in space.
ALL = dict.fromkeys(TYPES, 1.0)
PROGRAMS: dict[str, tuple[str, int, dict[str, float], str | None]] = {
    "TUMOUR": ("marker", 7, {"tumour": 1}, None),
    "GLAND": ("marker", 6, {"gland": 1}, None),
    "FIBRO": ("marker", 7, {"fibroblast": 1}, None),
    "BCELL": ("marker", 5, {"bcell": 2}, None),
    "TCELL": ("marker", 5, {"tcell": 2}, None),
    "MACRO": ("marker", 4, {"macrophage": 2}, None),
    "ENDO": ("marker", 4, {"endothelial": 2}, None),
    "FAT": ("marker", 4, {"fat": 3}, None),
    "EPITHEL": ("marker", 4, {"tumour": 0.7, "gland": 1}, None),
    "LEUCO": ("marker", 4, {"bcell": 1.5, "tcell": 1.5, "macrophage": 0.7}, None),
    "CLONEA": ("region", 3, {"tumour": 1}, "clone"),
    "CLONEB": ("region", 3, {"tumour": 1}, "other clone"),
    "INTERFERON": ("region", 4, ALL, "interferon"),
    "HYPOXIA": ("gradient", 4, {"tumour": 1.5, "macrophage": 0.5}, "depth in nest"),
    "FRONT": ("gradient", 3, {"fibroblast": 2.0, "macrophage": 1, "tumour": 0.3}, "near nest"),
    "ZONE": ("gradient", 4, ALL, "zone"),
    "CYCLE": ("cycle", 3, {"tumour": 4}, "cycling"),
    "HOUSE": ("housekeeping", 8, ALL, None),
    "NOISE": ("noise", 4, {}, None),
}
LEAK = 0.03  # weight of a cell type that a program does not name
CYCLING_SHARE = 0.12  # of the tumour cells


# --------------------------------------------------------------------------------------------------
# rates, molecules, spots
# --------------------------------------------------------------------------------------------------
def gene_table() -> pd.DataFrame:
    """One row a gene: program and kind; index = gene name."""
    rows = [(name, kind, i) for name, (kind, n, *_) in PROGRAMS.items() for i in range(1, n + 1)]
    table = pd.DataFrame(rows, columns=["program", "kind", "number"])
    table.index = pd.Index(table.program + table.number.astype(str), name="gene")
    return table


def expression_rates(
    layout: Layout, cells: pd.DataFrame, genes: pd.DataFrame, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Expected molecules (cells, genes) of each cell, and ambient ones (genes,) in all."""
    xy = cells[["nx", "ny"]].to_numpy()
    cycling = np.where(rng.random(len(cells)) < CYCLING_SHARE, 1.0, 0.02)
    fold = {}
    for program, (_, _, weights, field) in PROGRAMS.items():
        of_type = {t: weights.get(t, LEAK if weights else 0.0) for t in TYPES}
        weight = cells.type.map(of_type).to_numpy()
        space = cycling if field == "cycling" else np.ones(len(cells))
        if field and field != "cycling":
            space = layout.at(field, xy) * 0.97 + 0.03
        fold[program] = weight * space
    size = CELL_TYPES.rna[cells.type].to_numpy() * rng.gamma(8, 1 / 8, len(cells))
    abundance = rng.lognormal(0, 0.5, len(genes))
    rates = np.column_stack([fold[program] for program in genes.program]) * abundance
    rates *= size[:, None] * rng.gamma(CELL_NOISE_SHAPE, 1 / CELL_NOISE_SHAPE, rates.shape)
    rates *= MOLECULES_PER_CELL * len(cells) / rates.sum()
    ambient = AMBIENT_SHARE * rates.sum(0)
    noise = (genes.kind == "noise").to_numpy()
    ambient[noise] = np.median(rates.sum(0)) * abundance[noise]
    return rates * (1 - AMBIENT_SHARE), ambient


def expected_counts(
    cells: pd.DataFrame, rates: np.ndarray, ambient: np.ndarray, tissue_share: np.ndarray, grid: int
) -> np.ndarray:
    """Expected molecules (grid, grid, genes) per superpixel: shares of each cell's Gaussian cloud.

    The cloud is cut off beyond three superpixels from the one that holds the nucleus.
    """
    step, reach = utils.SUPERPIXEL_UM, np.arange(-3, 4)
    sd = CELL_TYPES.scatter[cells.type].to_numpy()[:, None]
    share, index = [], []
    for position in (cells.ny.to_numpy()[:, None], cells.nx.to_numpy()[:, None]):
        i = (position // step).astype(int) + reach  # (cells, 7)
        share.append(ndtr(((i + 1) * step - position) / sd) - ndtr((i * step - position) / sd))
        index.append(i)
    weight = share[0][:, :, None] * share[1][:, None, :]  # (cells, 7, 7)
    row, col = np.broadcast_arrays(index[0][:, :, None], index[1][:, None, :])
    inside = (row >= 0) & (row < grid) & (col >= 0) & (col < grid)
    cell = np.broadcast_to(np.arange(len(cells))[:, None, None], inside.shape)
    where = (row[inside] * grid + col[inside], cell[inside])
    spread = csr_array((weight[inside], where), shape=(grid * grid, len(cells)))
    mean = (spread @ rates).reshape(grid, grid, -1)
    return (mean + tissue_share[:, :, None] / tissue_share.sum() * ambient).astype(np.float32)


def scatter_molecules(
    layout: Layout,
    cells: pd.DataFrame,
    rates: np.ndarray,
    ambient: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Molecules inside the image: positions (M, 2) in um, gene index (M,)."""
    drawn = rng.poisson(rates)
    cell, gene = np.nonzero(drawn)
    times = drawn[cell, gene]
    cell, gene = np.repeat(cell, times), np.repeat(gene, times)
    sd = CELL_TYPES.scatter[cells.type].to_numpy()[cell, None]
    xy = cells[["nx", "ny"]].to_numpy()[cell] + sd * rng.standard_normal((len(cell), 2))
    free = np.repeat(np.arange(len(ambient)), rng.poisson(ambient))
    rows, cols = np.nonzero(layout.compartment != GLASS)
    place = rng.integers(len(rows), size=len(free))
    floating = np.column_stack([cols[place], rows[place]]) + rng.random((len(free), 2))
    xy, gene = np.vstack([xy, floating]), np.concatenate([gene, free])
    inside = ((xy >= 0) & (xy < len(layout.compartment))).all(1)
    return xy[inside], gene[inside]


def bin_molecules(xy: np.ndarray, gene: np.ndarray, grid: int, n_genes: int) -> np.ndarray:
    """Molecules (grid, grid, genes) uint16 per superpixel."""
    col, row = (xy // utils.SUPERPIXEL_UM).astype(int).T
    flat = (row * grid + col) * n_genes + gene
    counts = np.bincount(flat, minlength=grid * grid * n_genes)
    return counts.reshape(grid, grid, n_genes).astype(np.uint16)


def spot_lattice(layout: Layout) -> np.ndarray:
    """Centres (N, 2) in um of the Visium lattice's spots that lie on tissue, row by row."""
    size = len(layout.compartment)
    rows = np.arange(
        VISIUM_RADIUS_UM + 10, size - VISIUM_RADIUS_UM, VISIUM_PITCH_UM * np.sqrt(3) / 2
    )
    first = VISIUM_RADIUS_UM + 6
    last, half = size - VISIUM_RADIUS_UM, VISIUM_PITCH_UM / 2
    lines = [np.arange(first + i % 2 * half, last, VISIUM_PITCH_UM) for i in range(len(rows))]
    xy = np.array([(x, y) for line, y in zip(lines, rows, strict=True) for x in line])
    steps = np.arange(-VISIUM_RADIUS_UM, VISIUM_RADIUS_UM + 1)
    dx, dy = (axis.ravel() for axis in np.meshgrid(steps, steps))
    disc = np.column_stack([dx, dy])[np.hypot(dx, dy) <= VISIUM_RADIUS_UM]
    under = layout.at("compartment", (xy[:, None] + disc).reshape(-1, 2)).reshape(len(xy), -1)
    return xy[(under != GLASS).mean(1) >= MIN_SPOT_TISSUE]


def catch(
    xy: np.ndarray,
    gene: np.ndarray,
    spots: np.ndarray,
    efficiency: np.ndarray,
    n_genes: int,
    rng: np.random.Generator,
    radius: float = VISIUM_RADIUS_UM,
) -> np.ndarray:
    """Counts (spots, genes): the molecules within each disc, kept with the spot's efficiency."""
    distance, spot = cKDTree(spots).query(xy)
    kept = (distance <= radius) & (rng.random(len(xy)) < efficiency[spot])
    flat = spot[kept] * n_genes + gene[kept]
    return np.bincount(flat, minlength=len(spots) * n_genes).reshape(len(spots), n_genes)


# --------------------------------------------------------------------------------------------------
# the files
# --------------------------------------------------------------------------------------------------
def main(stage: utils.Stage) -> None:
    """Write the five input files and truth.npz of one section."""
    stage.guard(*WRITTEN)
    size_um, rng = stage.args.size_um, np.random.default_rng(stage.args.seed)
    layout = make_layout(size_um, rng)
    cells, genes = place_cells(layout, rng), gene_table()
    rates, ambient = expression_rates(layout, cells, genes, rng)
    xy, gene = scatter_molecules(layout, cells, rates, ambient, rng)
    grid, step = int(size_um / utils.SUPERPIXEL_UM), int(utils.SUPERPIXEL_UM)
    tissue_share = (layout.compartment != GLASS).reshape(grid, step, grid, step).mean((1, 3))
    spots = spot_lattice(layout)
    efficiency = np.minimum(CAPTURE * np.exp(rng.normal(0, DEPTH_SD, len(spots))), 1)
    caught = catch(xy, gene, spots, efficiency, len(genes), rng)

    with stage.writing(utils.HE_RAW) as partial:
        Image.fromarray(render(layout, cells, rng)).save(partial, quality=92)
    numbers = {utils.PIXEL_SIZE_RAW: PIXEL_UM, utils.RADIUS_RAW: VISIUM_RADIUS_UM / PIXEL_UM}
    for artifact, number in numbers.items():
        with stage.writing(artifact) as partial:
            partial.write_text(f"{number}\n")
    names = [f"spot{i:04d}" for i in range(len(spots))]
    with stage.writing(utils.LOCS_RAW) as partial:
        locs = pd.DataFrame(spots / PIXEL_UM, index=names, columns=["x", "y"])
        locs.to_csv(partial, float_format="%.2f")
    with stage.writing(utils.CNTS) as partial:
        pd.DataFrame(caught, index=names, columns=genes.index).to_csv(partial)
    with stage.writing(TRUTH) as partial:
        np.savez_compressed(
            partial,
            counts=bin_molecules(xy, gene, grid, len(genes)),
            mean=expected_counts(cells, rates, ambient, tissue_share, grid),
            tissue=tissue_share >= 0.5,
            regions=layout.main_compartments(grid),
            region_names=np.array(COMPARTMENTS),
            genes=genes.index.to_numpy(str),
            programs=genes.program.to_numpy(str),
            kinds=genes.kind.to_numpy(str),
            capture=CAPTURE,
        )
    print(
        f"simulated {size_um:.0f} x {size_um:.0f} um: {len(cells):,} cells, {len(xy):,} molecules "
        f"of {len(genes)} genes, {len(spots)} spots of {np.median(caught.sum(1)):.0f} counts"
    )
    stage.finish()


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(main, SCRIPT, build_parser(), argv, makes_folders=True)


if __name__ == "__main__":
    sys.exit(run())
