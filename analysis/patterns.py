"""Test for spatial patterns before (spots) and after (maps), gene by gene, and compare with chance.

    python analysis/patterns.py --directory data/section

Reads   cnts-super/, held-out-r.csv, HISTEX.json, locs.csv, radius.txt, cnts.csv; mask.png if it is
        there; truth.npz with --truth.

Writes  patterns.csv   a row per gene. found_by_spots, found_by_maps: it has a pattern in the spots,
                       in the maps; enhanced: the maps also predict left-out spots better than the
                       spots around these do; held_out_q: p of the held-out correlation, corrected
                       for all genes. The head of this script explains the other columns
        patterns.png   all genes, and maps of those that gain most
        patterns.json  the record, with numbers of genes and medians

Moran's I says whether neighbours are alike: it is about 0 by chance and 1 at most. It is computed
on square roots of counts per spot, whose counting noise has a standard deviation of 0.5 for every
gene; maps are first multiplied by the area of a spot. Two places are neighbours if they are spots
less than 1.3 pitches apart, or superpixels of the tissue that share a side. Columns that end in
``_I`` or ``_sd`` (standard deviation, the spatial variability) are of superpixels, except spots_I
and spots_sd. ``_spot_I`` is of the totals over the discs of the spots, with the same neighbours as
spots_I. Their names begin with

* spots: the measured counts. spots_p comes from permuting the counts over the spots; spots_q is
  corrected for all genes (Benjamini and Hochberg).
* maps: the maps of HISTEX.py.
* linear: the measured counts interpolated linearly, without any histology.
* null: the same interpolation of counts permuted over the spots: as smooth, but without a pattern.
  The value is the one that 95 % of the permutations do not reach.

Everything smooth has a high Moran's I. So it proves nothing that the I of a map is above that of
its spots. Nor does the I of superpixels: even permuted counts reach 0.95, and a sharp and true map
has less. (A map is also smooth in other ways than an interpolation is, since all genes share the
networks. So no null by interpolation can be enough.) But smoothing of mere noise cannot raise the
correlation with counts that the network has not seen (held-out-r.csv). Counts permuted over the M
held-out spots have correlations of mean 0 and variance 1 / (M - 1) with anything. If a few spots
hold all the counts, high ones are far more frequent than by a normal distribution. So held_out_p is
by permutation as well: the share of permuted counts that reach held_out_r with the totals of the
map in these spots. (These totals stand for the predictions, which HISTEX.py does not keep. After
permutation only their distribution matters, which is nearly the same.) held_out_q is corrected for
all genes.

Where there is a pattern, smoothing the surrounding spots also predicts held-out spots. A map must
do better than that. For the comparison a tenth of all spots is left out at a time, as in HISTEX.py.
linear_r is the correlation that interpolation reaches. It has the noise of two or three spots; for
a gene with few counts, a mean over more spots does better. So smooth_r is the best of three means,
Gaussians of 0.5, 1 and 2 pitches. It is chosen by the same counts with which it is compared, which
favours it.

A gene is

* found_by_spots, if spots_q is below 0.05: its measured counts have a pattern;
* found_by_maps, if held_out_q is below 0.05 and maps_spot_I is above null_spot_I: its map has a
  pattern that smoothing alone does not make, and that is there where the network has not looked;
* enhanced, if it is found by the maps and held_out_r is above linear_r and smooth_r: with the
  histology and the other genes, the map predicts unseen places better than smoothing of the
  surrounding spots does. This last comparison has no test for a single gene; the numbers of genes
  on either side show how sure it is.

The pattern may be that of the sequencing depth, since counts are taken as they are. --normalise
divides spots and maps by their totals over genes, as is usual. But this gives a pattern to genes
that have none: in simulated sections it finds nearly all of the noise genes. held_out_r is of
counts as they are.

With --truth, patterns.csv has the statistics of the ``mean`` of truth.npz as well (true_I, true_sd,
true_spot_I), and the record says how many genes of each of its ``kinds`` are found.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import files
from reading import cli

SCRIPT = "analysis/patterns.py"
PERMUTATIONS = 999


def build_parser() -> cli.Parser:
    parser = cli.stage_parser(__doc__)
    files.add_output(parser)
    option = parser.add_argument
    n_help = "Number of permutations of the counts over the spots."
    option("--permutations", type=cli.positive, default=PERMUTATIONS, help=n_help)
    option("--seed", type=cli.not_negative, default=0, help="Seed of the permutations.")
    normalise_help = "Divide the counts of spots and maps by their totals over genes."
    option("--normalise", action="store_true", help=normalise_help)
    option("--truth", action="store_true", help="Compare with the expected counts in truth.npz.")
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.sparse import csc_array, csr_array
from scipy.spatial import cKDTree

from analysis import regions
from analysis.inputs import (
    TRUTH,
    map_files,
    new_record,
    note_truth,
    read_first_map,
    read_held_out,
    read_radius,
    read_truth,
)
from analysis.scores import is_constant, pearson, rounded
from analysis.spots import gaussian_weights, interpolation_weights, sum_discs
from method.grid import neighbour_distance

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

AT_ONCE = 64  # permutations: what they take fits into the processor's cache, 3 times as fast
NEIGHBOURS_WITHIN = 1.3  # pitches: more than 1, less than the 1.41 of a square lattice's diagonal
MIN_SPOTS = 10  # among fewer, hardly any arrangement is surprising
MIN_HELD_OUT = 3  # with fewer, a correlation has no distribution
LEFT_OUT = 0.1  # share of the spots that interpolation does not see, as in HISTEX.py
MEANS_WITHIN = (0.5, 1.0, 2.0)  # sigmas of Gaussian means over the spots around, in pitches
MAX_Q = 0.05
NULL_END = 0.95  # quantile of the permutations that a map must exceed
TIE = 1e-9  # I that differ by less are equal: rounding depends on the order of summation
SHOWN = 4  # genes in the picture
PANEL_INCHES = 3.3  # width of a map in it
SATURATED = 99.0  # percentile at which the colours end
KINDS_OF_FINDING = {  # colours that the colour-blind tell apart
    "neither": "#999999",
    "spots only": "#4c78a8",
    "maps, no more than smoothing": "#e6a532",
    "enhanced": "#b5306b",
}
VERDICTS = ["found_by_spots", "found_by_maps", "enhanced"]
MEASURED = [
    "gene", "counts", "spots_I", "spots_sd", "spots_p", "maps_I", "maps_sd", "maps_spot_I",
    "linear_I", "linear_sd", "linear_spot_I", "null_I", "null_sd", "null_spot_I", "held_out_r",
    "held_out_p",
]  # fmt: skip
COLUMNS = [
    "gene", "counts", "spots_I", "spots_p", "spots_q", "maps_I", "linear_I", "null_I",
    "maps_spot_I", "linear_spot_I", "null_spot_I", "spots_sd", "maps_sd", "linear_sd", "null_sd",
    "held_out_r", "held_out_p", "held_out_q", "linear_r", "smooth_r", *VERDICTS,
]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Moran's I
# --------------------------------------------------------------------------------------------------
def spot_neighbours(centres: np.ndarray) -> csr_array:
    """Ones (spots, spots) where two spots are neighbours on the lattice."""
    within = NEIGHBOURS_WITHIN * neighbour_distance(centres)
    first, second = cKDTree(centres).query_pairs(within, output_type="ndarray").T
    where = np.concatenate([first, second]), np.concatenate([second, first])
    return csr_array((np.ones(len(where[0])), where), (len(centres), len(centres)))


def morans_i(x: np.ndarray, neighbours: csr_array) -> np.ndarray:
    """I (k,) of columns x (spots, k); NaN where one is constant."""
    z = x - x.mean(0)
    products = np.einsum("ij,ij->j", z, neighbours @ z) / neighbours.sum()
    return ratio(products, np.einsum("ij,ij->j", z, z) / len(z))


def ratio(covariance: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Moran's I; NaN where the variance is no more than rounding."""
    return np.where(variance > TIE**2, covariance / np.maximum(variance, TIE**2), np.nan)


def map_statistics(x: np.ndarray, tissue: np.ndarray) -> tuple[float, float]:
    """I and standard deviation of an image (rows, columns) on its tissue; NaN if constant."""
    inside = x[tissue].astype(np.float64)
    z = np.where(tissue, x - inside.mean(), 0)
    pairs = (tissue[1:] & tissue[:-1]).sum() + (tissue[:, 1:] & tissue[:, :-1]).sum()
    products = np.vdot(z[1:], z[:-1]) + np.vdot(z[:, 1:], z[:, :-1])
    return float(ratio(products / max(pairs, 1), inside.var())), float(inside.std())


class Interpolation:
    """Statistics of linear interpolations between spots, without making a map of any.

    The superpixels of the tissue are z = L x of the spots' values x. So all sums of products over
    superpixels are x' M x, with matrices M of spots by spots that are nearly empty.
    """

    def __init__(self, linear: csr_array, tissue: np.ndarray, discs: csr_array) -> None:
        inside = np.flatnonzero(tissue)
        at = np.full(tissue.size, -1)
        at[inside] = np.arange(len(inside))
        first, second = at[regions.neighbour_pairs(tissue)].T
        self.linear, self.inside = linear[inside], inside
        self.n, self.pairs = len(inside), max(len(first), 1)
        self.products = (self.linear[first].T @ self.linear[second]).tocsr()
        self.squares = (self.linear.T @ self.linear).tocsr()
        degree = np.bincount(np.concatenate([first, second]), minlength=self.n).astype(float)
        self.total, self.degrees = self.linear.sum(0), self.linear.T @ degree
        share = discs[:, inside]
        share = share.multiply(1 / share.sum(1)[:, None]).tocsr()
        self.discs = (share @ self.linear).tocsr()  # mean over the tissue of each disc

    def statistics(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """I and standard deviation (k,) over superpixels, for columns x (spots, k)."""
        x = x - x.mean(0)  # weights of a superpixel add up to 1, so that this shifts z alone
        mean = self.total @ x / self.n
        variance = np.einsum("ij,ij->j", x, self.squares @ x) / self.n - mean**2
        products = np.einsum("ij,ij->j", x, self.products @ x) - mean * (self.degrees @ x)
        covariance = products / self.pairs + mean**2
        return ratio(covariance, variance), np.sqrt(variance.clip(0))

    def image(self, x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The interpolation (rows, columns) of values x (spots,), NaN outside the tissue."""
        image = np.full(shape, np.nan)
        image.ravel()[self.inside] = self.linear @ x
        return image


# --------------------------------------------------------------------------------------------------
# tests
# --------------------------------------------------------------------------------------------------
def permutation_p(observed: float, null: np.ndarray) -> float:
    """Share of the permutations, the measured one among them, whose I is at least as high."""
    if np.isnan(observed):
        return 1.0
    return float((1 + (null >= observed - TIE).sum()) / (1 + len(null)))


def correlation_p(
    r: float, predicted: np.ndarray, counts: np.ndarray, orders: list[np.ndarray]
) -> float:
    """One-sided p of a correlation with counts (M,), against the counts in other ``orders``.

    ``predicted`` (M,) may be in any order itself.
    """
    if len(counts) < MIN_HELD_OUT or is_constant(predicted) or is_constant(counts):
        return 1.0
    y, z = predicted - predicted.mean(), counts - counts.mean()
    null = np.concatenate([y @ z[order] for order in orders]) / np.sqrt((y @ y) * (z @ z))
    return permutation_p(r, null)


def orders_of(n: int, permutations: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random orders (n, some) of n things, AT_ONCE of them in an array."""
    order = rng.permuted(np.tile(np.arange(n), (permutations, 1)), axis=1)
    return [order[at : at + AT_ONCE].T.copy() for at in range(0, permutations, AT_ONCE)]


def guess_left_out(
    centres: np.ndarray, counts: csc_array, held_out: np.ndarray, seed: int
) -> np.ndarray:
    """Counts (1 + means, M, genes) of the spots ``held_out``, guessed from spots of other parts.

    First interpolated linearly, then by the Gaussian means MEANS_WITHIN.
    """
    parts = max(1, round(len(held_out) / (LEFT_OUT * len(centres))))
    part = np.random.default_rng(seed).permutation(len(held_out)) % parts
    pitch = neighbour_distance(centres)
    guess = np.empty((1 + len(MEANS_WITHIN), len(held_out), counts.shape[1]))
    for i in range(parts):
        places = centres[held_out[part == i]]
        seen = np.setdiff1d(np.arange(len(centres)), held_out[part == i])
        _, linear = interpolation_weights(centres[seen], places)
        weights = [linear.toarray()]
        for sigma in MEANS_WITHIN:
            weights.append(gaussian_weights(centres[seen], places, sigma * pitch))
        guess[:, part == i] = [(counts[seen].T @ w.T).T for w in weights]
    return guess


def correlate_left_out(
    centres: np.ndarray, counts: csc_array, held_out: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Correlation (genes,) of interpolation with the spots it has not seen; of the best mean."""
    if len(held_out) < MIN_HELD_OUT:
        return np.full(counts.shape[1], np.nan), np.full(counts.shape[1], np.nan)
    guesses = guess_left_out(centres, counts, held_out, seed)
    measured = counts[held_out].toarray().T
    r = np.array([[pearson(*pair) for pair in zip(g.T, measured, strict=True)] for g in guesses])
    return r[0], r[1:].max(0)


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
class SpotsAndMaps:
    """The spots on the tissue of a sample, and the files of its maps."""

    def __init__(self, stage: utils.Stage) -> None:
        self.stage = stage
        self.files = map_files(stage.directory)
        self.genes = list(self.files)
        first, _ = read_first_map(stage, self.files)
        self.tissue = regions.tissue_of(stage, np.isfinite(first))
        spots = regions.read_measured_spots(stage)
        column = regions.columns_of(stage, spots.genes, self.genes)
        discs, keep = regions.discs_of(stage, spots.centres, self.tissue)
        if keep.sum() < MIN_SPOTS:
            raise stage.error(
                stage.path(utils.LOCS),
                f"has {keep.sum()} spots on the tissue; expected {MIN_SPOTS} at least.",
                regions.MORE_SPOTS,
            )
        self.every_spot, self.spots = spots.ids, spots.ids[keep]
        self.centres, self.discs = spots.centres[keep], discs[keep]
        self.counts = csc_array(spots.counts[keep][:, column], dtype=np.float64)
        self.radius = read_radius(stage.directory)  # superpixels
        self.area = np.pi * self.radius**2
        self.scale, self.map_scale = np.ones(len(self.spots)), np.ones(self.tissue.shape)
        if stage.args.normalise:
            self.scale = 1 / np.maximum(self.counts.sum(axis=1), 1)
            self.scale /= np.median(self.scale)
            total = np.zeros(self.tissue.shape)
            for gene in self.genes:
                total += np.where(self.tissue, self.map(gene), 0)
            self.map_scale = 1 / np.maximum(total, 1 / self.area)  # a count per spot, at least
            self.map_scale /= np.median(self.map_scale[self.tissue])

    def map(self, gene: str) -> np.ndarray:
        return regions.read_checked(self.stage, self.files[gene], self.tissue)

    @functools.cached_property
    def neighbours(self) -> csr_array:
        return spot_neighbours(self.centres)

    @functools.cached_property
    def between(self) -> Interpolation:
        linear = regions.interpolation_of(self.stage, self.centres, self.tissue)
        return Interpolation(linear, self.tissue, self.discs)

    def roots(self, column: int) -> np.ndarray:
        """Square roots (spots,) of the counts of a gene."""
        return np.sqrt(self.counts[:, [column]].toarray().ravel() * self.scale)

    def totals(self, image: np.ndarray, spots: np.ndarray) -> np.ndarray:
        """Counts (spots,) that a map (rows, columns) holds in the discs of spots."""
        return sum_discs(self.discs[spots], np.where(self.tissue, image, 0))

    def statistics(self, image: np.ndarray) -> tuple[float, float, float]:
        """I and standard deviation over superpixels of a map (rows, columns); I over its discs."""
        image = np.where(self.tissue, image, 0) * self.map_scale
        totals = np.sqrt(sum_discs(self.discs, image))[:, None]
        of_map = map_statistics(np.sqrt(image * self.area), self.tissue)
        return *of_map, float(morans_i(totals, self.neighbours)[0])


def read_correlations(stage: utils.Stage, section: SpotsAndMaps) -> tuple[np.ndarray, np.ndarray]:
    """Correlation (genes,) with the counts of held-out spots; which spots (M,) of the section."""
    r = read_held_out(stage)
    assert r is not None  # it is required; this is for mypy  # nosec B101
    record = stage.directory / utils.record_name(utils.HISTEX)
    again = new_record(stage, utils.HISTEX)
    told = stage.fact(utils.HISTEX, "held_out_spots")
    spots = [] if told is None else told
    if not isinstance(spots, list):
        raise stage.error(record, "does not list held_out_spots.", again)
    spots = pd.Index([str(spot) for spot in spots], dtype=str)
    unknown = spots.difference(section.every_spot)
    if len(unknown):
        names = f"{len(unknown)} held-out spots that {utils.LOCS.name} lacks: {utils.some(unknown)}"
        raise stage.error(record, f"names {names}.", again)
    at = section.spots.get_indexer(spots)
    if (at < 0).any():
        stage.warn(f"{(at < 0).sum()} held-out spots are not on the tissue and are left out")
        at = at[at >= 0]
    return r.reindex(section.genes).to_numpy(float), np.sort(at)


def measure_genes(
    section: SpotsAndMaps,
    held_out: np.ndarray,
    held_out_r: np.ndarray,
    permutations: int,
    seed: int,
) -> pd.DataFrame:
    """Moran's I, standard deviations and p of every gene, a map in memory at a time."""
    neighbours, between = section.neighbours, section.between
    rng = np.random.default_rng(seed)
    orders = orders_of(len(section.spots), permutations, rng)  # the same for all genes
    orders_held_out = orders_of(len(held_out), permutations, rng)
    rows = []

    def of_spots(x: np.ndarray) -> tuple[np.ndarray, ...]:
        """I, I and standard deviation interpolated, I over discs of that (k,); x (spots, k)."""
        over_discs = morans_i(between.discs @ x, neighbours)
        return morans_i(x, neighbours), *between.statistics(x), over_discs

    for i, gene in enumerate(section.genes):
        x = section.roots(i)
        spots_i, *linear = (float(found[0]) for found in of_spots(x[:, None]))
        permuted = [of_spots(x[order]) for order in orders]
        null_spots_i, *null = (np.concatenate(parts) for parts in zip(*permuted, strict=True))
        ends = [float(np.quantile(values, NULL_END)) for values in null]
        counts, image = section.counts[:, [i]].toarray().ravel(), section.map(gene)
        totals = section.totals(image, held_out)
        rows.append(
            (
                gene, counts.sum(), spots_i, float(x.std()), permutation_p(spots_i, null_spots_i),
                *section.statistics(image), *linear, *ends, held_out_r[i],
                correlation_p(held_out_r[i], totals, counts[held_out], orders_held_out),
            )
        )  # fmt: skip
    return pd.DataFrame(rows, columns=MEASURED)


def add_verdicts(table: pd.DataFrame, linear_r: np.ndarray, smooth_r: np.ndarray) -> pd.DataFrame:
    """The measured table with what the spots around tell, and the verdicts."""
    table = table.assign(
        spots_q=stats.false_discovery_control(table["spots_p"]),
        held_out_q=stats.false_discovery_control(table["held_out_p"]),
        linear_r=linear_r,
        smooth_r=smooth_r,
    )
    found_by_maps = (table["held_out_q"] < MAX_Q) & (table["maps_spot_I"] > table["null_spot_I"])
    return table.assign(
        found_by_spots=table["spots_q"] < MAX_Q,
        found_by_maps=found_by_maps,
        enhanced=found_by_maps & (table["held_out_r"] > best_around(table)),
    )


def best_around(table: pd.DataFrame) -> pd.Series:
    """What the spots around tell of those that are not seen, interpolated or smoothed."""
    return table[["linear_r", "smooth_r"]].max(axis=1)


def add_truth(table: pd.DataFrame, section: SpotsAndMaps) -> pd.DataFrame:
    """The statistics of the true expectation, and the kinds of the genes."""
    stage = section.stage
    note_truth(stage)
    truth = read_truth(stage.directory)
    at = pd.Index(truth.genes).get_indexer(pd.Index(section.genes))
    if truth.mean is None or (at < 0).any():
        raise utils.StageError(
            f"{stage.directory / TRUTH} does not hold the true mean of all {len(at)} genes.",
            "--truth is for simulated sections; leave it out.",
        )
    image = np.zeros(section.tissue.shape)
    rows, columns = np.minimum(image.shape, truth.tissue.shape)
    true = []
    for i in at:
        image[:rows, :columns] = truth.mean[:rows, :columns, i] * truth.capture
        true.append(section.statistics(image))
    names = ["true_I", "true_sd", "true_spot_I"]
    table = table.assign(**dict(zip(names, np.transpose(true), strict=True)))
    return table if truth.kinds is None else table.assign(kind=[truth.kinds[i] for i in at])


COMPARED = [
    ("maps_spot_I", "spots_I"), ("maps_spot_I", "null_spot_I"), ("maps_spot_I", "linear_spot_I"),
    ("held_out_r", "linear_r"),
]  # fmt: skip


def summarise(table: pd.DataFrame) -> dict[str, Any]:
    """Counts of genes, and medians over all of them."""
    medians = table.select_dtypes("float").drop(columns=["counts"], errors="ignore").median()
    facts = {
        "genes": len(table),
        **{name.replace("_", " "): int(table[name].sum()) for name in VERDICTS},
        "found by maps, not by spots": int((table.found_by_maps & ~table.found_by_spots).sum()),
        "found by spots, not by maps": int((table.found_by_spots & ~table.found_by_maps).sum()),
        **{f"{a} above {b}": int((table[a] > table[b]).sum()) for a, b in COMPARED},
        "held_out_q below 0.05": int((table.held_out_q < MAX_Q).sum()),
        "held_out_r above both": int((table.held_out_r > best_around(table)).sum()),
        "medians": {name: rounded(value) for name, value in medians.items()},
    }
    if "kind" in table:
        facts["kinds"] = {
            kind: {"genes": len(part), **{name: int(part[name].sum()) for name in VERDICTS}}
            for kind, part in table.groupby("kind")
        }
    return facts


def draw(table: pd.DataFrame, section: SpotsAndMaps) -> Figure:
    """Both comparisons of all genes; spots, interpolation and map of those enhanced most."""
    from matplotlib.figure import Figure

    gain = (table["held_out_r"] - best_around(table)).where(table["enhanced"]).dropna()
    shown = gain.sort_values(ascending=False, kind="stable").index[:SHOWN]
    rows, columns = section.tissue.shape
    height = 4.2 + len(shown) * (3.4 * rows / columns + 0.4)
    figure = Figure(figsize=(11, height), layout="constrained", dpi=110)
    ratios = [4.2] + [3.4 * rows / columns + 0.4] * len(shown)
    parts = figure.subfigures(1 + len(shown), 1, height_ratios=ratios, squeeze=False)[:, 0]
    draw_genes(parts[0].subplots(1, 2), table)
    for part, i in zip(parts[1:], shown, strict=True):
        draw_gene(part, table.loc[i], section, section.counts[:, [i]].toarray().ravel())
    return figure


def draw_genes(axes: np.ndarray, table: pd.DataFrame) -> None:
    found = np.select(
        [table["enhanced"], table["found_by_maps"], table["found_by_spots"]],
        [*reversed(KINDS_OF_FINDING)][:3],
        "neither",
    )
    table = table.assign(around=best_around(table))
    pairs = (("spots_I", "maps_spot_I"), ("around", "held_out_r"))
    for ax, (x, y) in zip(axes, pairs, strict=True):
        for kind, colour in KINDS_OF_FINDING.items():
            part = table[found == kind]
            label = f"{kind}: {len(part)}"
            ax.scatter(part[x], part[y], s=16, color=colour, alpha=0.7, linewidths=0, label=label)
        values = table[[x, y]].to_numpy()
        low, high = np.nanmin([*values.ravel(), 0]) - 0.05, 1
        ax.plot([low, high], [low, high], color="0.7", lw=1, zorder=0)
        ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        ax.spines[["top", "right"]].set_visible(False)
    end = table["null_spot_I"].median()
    axes[0].axhspan(axes[0].get_ylim()[0], end, color="0.9", zorder=-1)
    axes[0].text(1, end, "null, 95 %", ha="right", va="top", fontsize=8, color="0.35")
    axes[0].set(xlabel="Moran's I of the measured spots", ylabel="Moran's I of the maps, at spots")
    axes[1].set(
        xlabel="r with unseen spots, best of interpolation and smoothing",
        ylabel="r with unseen spots, maps",
    )
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    axes[0].set_title(f"{len(table)} genes; above the line is also what is smooth", fontsize=10)
    axes[1].set_title("above the line is more than smoothing gives", fontsize=10)


def draw_gene(part: SubFigure, row: pd.Series, section: SpotsAndMaps, counts: np.ndarray) -> None:
    """Counts per spot: measured, interpolated, and the map, on one scale."""
    shape = section.tissue.shape
    image = np.where(section.tissue, section.map(row["gene"]), np.nan) * section.area
    top = max(float(np.percentile(counts, SATURATED)), 1e-6)
    axes, style = part.subplots(1, 3), {"cmap": "magma", "vmin": 0, "vmax": top}
    axes[0].imshow(np.where(section.tissue, 1, np.nan), cmap="gray", vmin=0, vmax=1.7)
    y, x = section.centres.T - 0.5
    points = 2 * section.radius * PANEL_INCHES * 72 / shape[1]  # diameter of a spot on the map
    axes[0].scatter(x, y, c=counts, s=max(points, 2) ** 2, linewidths=0, **style)
    axes[0].set(xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5), aspect="equal")
    axes[1].imshow(section.between.image(counts, shape), interpolation="nearest", **style)
    picture = axes[2].imshow(image, interpolation="nearest", **style)
    titles = (
        f"{row['gene']}: spots, I {row['spots_I']:.2f}",
        f"interpolation, r {row['linear_r']:.2f} (smoothing {row['smooth_r']:.2f})",
        f"map, r with unseen spots {row['held_out_r']:.2f}",
    )
    for ax, title in zip(axes, titles, strict=True):
        regions.bare(ax, title)
    part.colorbar(picture, ax=list(axes), extend="max", label="counts per spot", pad=0.01)


def find_patterns(stage: utils.Stage) -> None:
    args = stage.args
    files.guard_outputs(stage)
    stage.require(utils.MAPS, utils.HELD_OUT, utils.LOCS, utils.RADIUS, utils.CNTS)
    section = SpotsAndMaps(stage)
    held_out_r, held_out = read_correlations(stage, section)
    if len(held_out) < MIN_HELD_OUT:
        stage.warn(f"{len(held_out)} held-out spots: the maps' patterns cannot be tested")
    print(f"{len(section.genes)} genes, {len(section.spots)} spots, {len(held_out)} held out")
    table = measure_genes(section, held_out, held_out_r, args.permutations, args.seed)
    around = correlate_left_out(section.centres, section.counts, held_out, args.seed)
    table, columns = add_verdicts(table, *around), COLUMNS
    if args.truth:
        table = add_truth(table, section)
        columns = [*COLUMNS, *table.columns.difference([*COLUMNS, *MEASURED], sort=False)]
    facts = {
        "spots": len(section.spots),
        "held-out spots": len(held_out),
        "permutations": args.permutations,
        "seed": args.seed,
        **summarise(table),
    }
    regions.print_facts(facts)
    regions.save(stage, {files.PATTERN_TABLE: table[columns]})
    if not args.no_plot:
        regions.save(stage, {files.PATTERN_PICTURE: draw(table, section)})
    stage.finish(**facts)


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(find_patterns, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
