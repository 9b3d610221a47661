"""What shape the errors of maps have, by the truth: the figures that method/errors.py stands on.

    python benchmarks/error_shape.py --directory data/kidney data/pancreas

Reads   of every folder: cnts-super/ (HISTEX.py), locs.csv, radius.txt, truth.npz
Writes  a table in Markdown to stdout, for each section

The variance of the errors is what their squares are above the noise of counts, added up over
places; that of a place is taken in units of its map times the gene's mean, since genes differ by
their means. Genes of fewer than --fewest counts in the section are left out, and the median over
genes is shown, relative to all places:

* by the distance from the nearest spot, in radii of a spot, beside 1 + the distance, 3 at most;
* by tenths of the map, where the variance is taken over the map itself: flat if it is proportional;
* by the size of a block, beside what the correlation of neighbours leaves of the variance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from benchmarks import measure
from reading import cli

SCRIPT = "benchmarks/error_shape.py"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--directory",
        type=cli.sample_directory,
        nargs="+",
        required=True,
        metavar="DIR",
        help="Finished samples with a truth.npz; nothing is written there.",
    )
    parser.add_argument(
        "--fewest", type=cli.positive, default=2000, help="Counts of a gene in the section."
    )
    return parser


if __name__ == "__main__":
    cli.start(build_parser())  # what needs none of the slow imports below

import itertools

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import rankdata

from analysis import inputs, scores
from analysis.uncertainty import sd_of_blocks
from method import errors

SIZES = (1, 2, 4, 8)  # superpixels per side of a block
EDGES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, np.inf)  # radii
TENTHS = (0, 2, 4, 6, 8, 9)


def in_parts(excess: np.ndarray, said: np.ndarray, part: np.ndarray, n: int) -> np.ndarray:
    """Excess over said (n,) in parts 0..n - 1 of places, relative to all; NaN for few places."""
    count, above, below = (np.bincount(part, x, n) for x in (np.ones(len(part)), excess, said))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (above / below) / (excess.sum() / said.sum())
    return np.where(count >= 30, ratio, np.nan)


class Shape:
    """Gathers the three rows of every gene of a section."""

    def __init__(self, truth: inputs.Truth, centres: np.ndarray, radius: float) -> None:
        self.truth = truth
        self.grids = [scores.Blocks(truth.tissue, size) for size in SIZES]
        places = np.argwhere(np.ones_like(truth.tissue)) + 0.5
        distance = cKDTree(centres).query(places)[0] / radius
        self.distance = distance.reshape(truth.tissue.shape)
        self.by_distance: dict[int, list[np.ndarray]] = {size: [] for size in SIZES[:3]}
        self.by_map: list[np.ndarray] = []
        self.by_size: list[np.ndarray] = []

    def add(self, counts: np.ndarray, image: np.ndarray) -> None:
        """One gene: true counts and the map (rows, columns)."""
        molecules, capture = scores.whole_counts(counts), self.truth.capture
        known, variances = np.isfinite(image), []
        mean = image[self.truth.tissue & known].mean() / capture
        for blocks in self.grids:
            chosen = blocks.scored & (blocks.total(known) > 0)
            true = blocks.total(np.where(known, molecules, 0))[chosen]
            said = blocks.total(image)[chosen] / capture
            excess = np.square(true - said) - said
            variances.append(excess.sum() / (said * mean * blocks.area[chosen]).sum())
            unknown = blocks.size == 1 and molecules is not counts
            if blocks.size in self.by_distance and not unknown:
                apart = blocks.mean(self.distance)[chosen]
                part = np.digitize(apart, EDGES) - 1
                self.by_distance[blocks.size].append(in_parts(excess, said, part, len(EDGES) - 1))
            if blocks.size == SIZES[2]:
                tenth = ((rankdata(said, method="ordinal") - 1) * 10 // len(said)).astype(int)
                self.by_map.append(in_parts(excess, said, tenth, 10)[list(TENTHS)])
        self.by_size.append(np.array(variances) / variances[2])


def expected_by_size() -> list[float]:
    """What a block of each size has of a superpixel's relative variance, over that of 4 x 4."""
    each = []
    for size in SIZES:
        flat = np.ones((size, size))
        each.append(float(sd_of_blocks(flat, scores.Blocks(flat > 0, size)).item() / size**2) ** 2)
    return [one / each[2] for one in each]


def texts(values: np.ndarray | list[float]) -> list[str]:
    return ["" if np.isnan(value) else f"{value:.2f}" for value in values]


def table(shape: Shape) -> list[str]:
    """Three tables in Markdown."""

    def middle(rows: list[np.ndarray]) -> list[str]:
        columns = [column[np.isfinite(column)] for column in np.transpose(rows)]
        return texts([float(np.median(column)) if len(column) else np.nan for column in columns])

    ends = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(EDGES[:-1])]
    middles = np.array([*(np.add(EDGES[:-2], EDGES[1:-1]) / 2), errors.FARTHEST])
    heads = ["radii from a spot", *ends, f"over {EDGES[-2]:g}"]
    rows = [[f"{8 * n} um", *middle(rows)] for n, rows in shape.by_distance.items() if rows]
    near = shape.truth.tissue
    whole = 1 + np.minimum(shape.distance[near], errors.FARTHEST).mean()
    rows.append(["1 + distance, relative", *texts((1 + middles) / whole)])
    lines = measure.table(heads, rows)
    tenths = ["tenth of the map, 32 um", *(str(tenth + 1) for tenth in TENTHS)]
    lines += ["", *measure.table(tenths, [["variance over map", *middle(shape.by_map)]])]
    sizes = ["block", *(f"{8 * size} um" for size in SIZES)]
    rows = [["variance", *middle(shape.by_size)], ["by the rule", *texts(expected_by_size())]]
    return [*lines, "", *measure.table(sizes, rows)]


def shape_of(directory: Path, fewest: int) -> Shape:
    truth = inputs.read_truth(directory)
    files = inputs.map_files(directory)
    genes = [gene for gene in truth.genes if gene in files]
    centres, _ = inputs.read_spots(directory, genes)
    shape = Shape(truth, centres, inputs.read_radius(directory))
    for gene in genes:
        counts = truth.counts[..., truth.genes.index(gene)]
        if counts[truth.tissue].sum() >= fewest:
            shape.add(counts, inputs.read_map(files[gene], truth.tissue.shape))
    if not shape.by_size:
        raise utils.StageError(
            f"{directory} has no gene of {fewest} counts.", "Give fewer by --fewest."
        )
    return shape


def main(args: argparse.Namespace) -> None:
    for directory in args.directory:
        shape = shape_of(directory, args.fewest)
        name = f"{directory.resolve().name}, {len(shape.by_size)} genes"
        print("\n".join(["", f"## {name}", "", *table(shape)]), flush=True)
    print("\n".join(["", *measure.origin(args.command)]))


def run(argv: list[str] | None = None) -> int:
    return measure.run_benchmark(main, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
