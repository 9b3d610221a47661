"""Segment the tissue into regions of alike expression, at the resolution of the maps.

    python analysis/segment.py --directory data/section
    python analysis/segment.py --directory data/section --method leiden --n-regions 12

What is segmented are the latent maps of HISTEX.py (embeddings-gene.pickle): they hold the spots and
the histology in 128 numbers a superpixel. They are smoothed within the tissue (Gaussian of
``--smoothing-um``) and turned into their principal components, as many as hold 95 % of the
variance. Then one of three methods:

* kmeans: the best of several starts (k-means++), fitted to 50,000 superpixels drawn at random.
* hierarchical: k-means with 100 centres, which Ward's method joins to regions. For a tree of
  regions, ask for more or fewer of them: they nest.
* leiden: blocks of superpixels (at most 20,000 of them) are the nodes of a graph; each is joined to
  its 15 nearest in expression, weighted by how many neighbours the two share. The resolution of
  Leiden's method is searched for the number of regions asked for.

Connected pieces smaller than ``--min-region-mm2`` are merged into the region with which they share
the longest border, and regions are numbered by their area. What is outside mask.png is no region.

The number of regions, 8 if you do not give it, is a choice and no finding: stability tells how far
it can be trusted. The partition is made anew ``--seeds`` times, each time from a random half of the
tissue (squares of 200 um) and for all of it. The adjusted Rand index (ARI) of every two is 1 if
they agree and 0 if they agree as by chance. Under about 0.8, borders depend on chance; try fewer
regions, or more smoothing. A high one says that the cut can be repeated, not that it is sharp: a
gradient can be cut just as stably.

Marker genes. Superpixels of a map are no independent observations, so genes are tested at the spots
that were measured, all genes of cnts.csv: a spot belongs to the region under most of its disc.
Counts are divided by the spot's total and multiplied by the median total. Given are the log2 fold
change of the means, within against without (0.05 counts added to both), the AUC (probability that a
spot within has more than one without; 0.5 is chance), p by the two-sided Mann-Whitney test and q by
Benjamini and Hochberg over all genes and regions; auc_counts and q_counts are those of the counts
as they are. A gene is ``higher`` in a region if it has more there either way, both q below 0.05.
The share alone would not do: where there are few counts, as in fat, even a gene that is the same
everywhere makes up more of them; nor the counts: where there are many, every gene has more. The
regions were found in the same counts: q ranks genes, and does not prove that the region exists.

Files in: embeddings-gene.pickle, locs.csv, radius.txt, cnts.csv; mask.png and Histology_rgb.npy if
they are there. Files out: segments.npy, uint8 or uint16 (rows, columns), 0 for no region,
segments.csv (area, colour and first markers of every region), markers.csv, segments.png and
segments.json. With --truth, also the ARI with the regions of truth.npz, beside that of k-means on
linearly interpolated spots.
"""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from scipy import stats
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import csc_array, csr_array
from scipy.spatial import QhullError, cKDTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import regions
from analysis.inputs import TRUTH, read_radius
from analysis.scores import rounded
from analysis.spots import (
    disc_weights,
    interpolation_weights,
    on_tissue,
    superpixel_centres,
)
from reading import pickles, tables

SCRIPT = "analysis/segment.py"
N_REGIONS = 8
SMOOTHING_UM = 8.0  # more of it makes rings, of what lies between two kinds of tissue
MIN_REGION_MM2 = 0.005
VARIANCE_KEPT, MOST_COMPONENTS = 0.95, 30  # of the principal components
FITTED = 50_000  # superpixels by which k-means finds its centres
SQUARE = 25  # superpixels, 200 um: side of what is in one half of the tissue or in the other
STARTS, MOST_STEPS = 8, 100  # of k-means
SETTLED = 1e-3  # k-means ends when no centre moves further, in standard deviations
WARD_CENTRES = 100  # leaves of the tree
NODES, NEIGHBOURS = 20_000, 15  # of Leiden's graph
SEARCHES, ROUNDS = 25, 2  # of the resolution that gives the number of regions; of each of them
MIN_SPOTS = 5  # on either side of a test; with fewer, no p value can be small
PSEUDO_COUNT = 0.05  # per spot, in fold changes: without it, absent genes would have infinite ones
GENES_AT_ONCE = 256
TIE = 1e-9  # counts that differ by less are equal: 1 of 3 is 2 of 6
LEVEL = 0.05  # of q
NAMED = 3  # genes a region in the picture


# --------------------------------------------------------------------------------------------------
# features
# --------------------------------------------------------------------------------------------------
def read_embedding(stage: utils.Stage) -> np.ndarray:
    """Latent maps float32 (dims, rows, columns), NaN outside the tissue."""
    path = stage.path(utils.EMBEDDINGS)
    content = pickles.read_pickle(path)
    found = content.get("cls") if isinstance(content, dict) else None
    known = isinstance(found, np.ndarray) and found.ndim == 3 and found.dtype.kind == "f"
    if not known or found.size == 0:
        raise stage.error(path, f"does not hold {utils.EMBEDDINGS.what}.")
    return found


def principal_components(
    embedding: np.ndarray, tissue: np.ndarray, sigma_um: float
) -> tuple[np.ndarray, float]:
    """Scores float32 (superpixels of the tissue, components), and their share of the variance.

    ``embedding`` (dims, rows, columns) is not changed; one dim at a time is smoothed.
    """
    x = np.empty((len(embedding), int(tissue.sum())), np.float32)
    for i, image in enumerate(embedding):
        x[i] = regions.smooth(image, tissue, sigma_um)[tissue]
    x -= x.mean(1, keepdims=True, dtype=np.float64)
    variance, axes = np.linalg.eigh(x @ x.T / np.float32(x.shape[1]))
    share = np.cumsum(variance[::-1].clip(0)) / max(variance.clip(0).sum(), 1e-30)
    n = min(int(np.searchsorted(share, VARIANCE_KEPT)) + 1, MOST_COMPONENTS, len(share))
    return (axes[:, ::-1][:, :n].T @ x).T.copy(), float(share[n - 1])


# --------------------------------------------------------------------------------------------------
# partitions
# --------------------------------------------------------------------------------------------------
def nearest_centre(x: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index (n,) of the nearest of the centres, and the squared distance to it, in blocks."""
    nearest, distance = np.empty(len(x), np.int64), np.empty(len(x), np.float64)
    for start in range(0, len(x), FITTED):
        part = x[start : start + FITTED]
        squares = (centres**2).sum(1) - 2 * part @ centres.T
        best = squares.argmin(1)
        nearest[start : start + FITTED] = best
        left = squares[np.arange(len(part)), best] + (part**2).sum(1)
        distance[start : start + FITTED] = left.clip(0)
    return nearest, distance


def k_means(x: np.ndarray, k: int, seed: int, starts: int = STARTS) -> np.ndarray:
    """Centres (k, dims) of the best of several starts, fitted to at most FITTED rows of x."""
    rng = np.random.default_rng(seed)
    if len(x) > FITTED:
        x = x[np.sort(rng.choice(len(x), FITTED, replace=False))]
    cv2.setRNGSeed(seed)
    until = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, MOST_STEPS, SETTLED * x.std())
    return cv2.kmeans(np.ascontiguousarray(x), k, None, until, starts, cv2.KMEANS_PP_CENTERS)[2]


def by_k_means(
    x: np.ndarray, tissue: np.ndarray, k: int, seed: int, fitted: np.ndarray
) -> np.ndarray:
    """Partition (superpixels,) by numbers from 0, by what is ``fitted`` (superpixels,) of it."""
    some = x[fitted]
    return nearest_centre(x, k_means(some, min(k, len(some)), seed))[0]


def by_ward(x: np.ndarray, tissue: np.ndarray, k: int, seed: int, fitted: np.ndarray) -> np.ndarray:
    some = x[fitted]
    centres = k_means(some, min(max(WARD_CENTRES, k), len(some)), seed, starts=1)
    joined = fcluster(linkage(centres, "ward"), k, "maxclust") - 1 if len(centres) > 1 else [0]
    return np.asarray(joined)[nearest_centre(x, centres)[0]]


def by_leiden(
    x: np.ndarray, tissue: np.ndarray, k: int, seed: int, fitted: np.ndarray
) -> np.ndarray:
    """Leiden's method on blocks; a superpixel has the region of its block.

    A block outside ``fitted`` has that of the block in it that is nearest in expression.
    """
    side = int(np.ceil(np.sqrt(max(1, len(x) / NODES))))
    block, _ = square_of(tissue, side)
    members = csr_array((np.ones(len(x), x.dtype), (block, np.arange(len(x)))))
    means = (members @ x) / np.bincount(block)[:, None].astype(x.dtype)
    used = np.bincount(block, weights=fitted) > 0
    found = leiden(means[used], k, seed)
    if not used.all():
        found = found[cKDTree(means[used]).query(means)[1]]
    return found[block]


def leiden(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Partition (n,) of rows; of all resolutions tried, that whose number of parts is nearest k."""
    from graspologic_native import leiden_csr

    graph = shared_neighbours(x)
    parts = graph.indptr.astype(np.int64), graph.indices.astype(np.int32), graph.data
    low, high, best = 1e-3, 10.0, None
    for _ in range(SEARCHES):
        middle = float(np.sqrt(low * high))
        _, found = leiden_csr(*parts, len(x), resolution=middle, iterations=ROUNDS, seed=seed)
        communities = np.array([found[node] for node in range(len(x))])
        n = communities.max() + 1
        if best is None or abs(n - k) < abs(best.max() + 1 - k):
            best = communities
        if n == k:
            break
        low, high = (middle, high) if n < k else (low, middle)
    return best


def square_of(tissue: np.ndarray, side: int) -> tuple[np.ndarray, int]:
    """Number (superpixels,) of the square that holds each superpixel; how many there are."""
    row, column = (axis // side for axis in np.nonzero(tissue))
    squares, index = np.unique(row * tissue.shape[1] + column, return_inverse=True)
    return index, len(squares)


def half_of(tissue: np.ndarray, seed: int) -> np.ndarray:
    """Which superpixels (superpixels,) lie in a random half of the squares."""
    square, n = square_of(tissue, SQUARE)
    return np.random.default_rng(seed).permutation(n)[square] < n / 2


def shared_neighbours(x: np.ndarray) -> csr_array:
    """Graph (n, n) of rows and their nearest: the share of their neighbours that two have both."""
    n, k = len(x), min(NEIGHBOURS, len(x) - 1)
    near = cKDTree(x).query(x, k + 1)[1]
    mine = csr_array((np.ones(near.size), (np.arange(n).repeat(k + 1), near.ravel())), (n, n))
    joined = mine + mine.T > 0
    joined.setdiag(False)
    common = (mine @ mine.T).multiply(joined).tocsr()
    common.data /= 2 * (k + 1) - common.data
    common.eliminate_zeros()
    common.sort_indices()
    return common


METHODS = {"kmeans": by_k_means, "hierarchical": by_ward, "leiden": by_leiden}
TITLES = {"kmeans": "k-means", "hierarchical": "Ward's method", "leiden": "Leiden's method"}


def as_labels(partition: np.ndarray, tissue: np.ndarray, min_mm2: float) -> np.ndarray:
    """Labels (rows, columns) of a partition (superpixels,), small pieces merged, by size."""
    labels = np.zeros(tissue.shape, np.int64)
    labels[tissue] = partition + 1
    smallest = int(np.ceil(min_mm2 / regions.SUPERPIXEL_MM2))
    return regions.by_size(regions.merge_small(labels, smallest))


# --------------------------------------------------------------------------------------------------
# marker genes
# --------------------------------------------------------------------------------------------------
def rank_tests(values: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC and two-sided Mann-Whitney p (regions, genes) of values (spots, genes).

    ``inside`` (spots, regions) is true for the spots of a region. Ties are corrected for, and the
    normal distribution is corrected for continuity, as by scipy's asymptotic method; the ranks are
    those of all regions, so they are computed once.
    """
    n, first = len(values), inside.sum(0)[:, None].astype(float)
    ranks = stats.rankdata(values, axis=0)
    u = inside.T.astype(float) @ ranks - first * (first + 1) / 2
    ordered = np.sort(ranks, axis=0)
    ties = np.zeros(values.shape[1])
    for gene in range(values.shape[1]):
        times = np.unique(ordered[:, gene], return_counts=True)[1].astype(float)
        ties[gene] = (times**3 - times).sum()
    pairs = first * (n - first)
    sd = np.sqrt(pairs / 12 * np.maximum(n + 1 - ties / (n * (n - 1)), 0))
    z = (np.abs(u - pairs / 2) - 0.5).clip(0) / np.where(sd > 0, sd, np.inf)
    return u / pairs, 2 * stats.norm.sf(z)


def find_markers(counts: csr_array, genes: pd.Index, region: np.ndarray) -> pd.DataFrame:
    """Table of all genes in all regions with enough spots; counts (spots, genes), region (spots,).

    Spots of region 0 have no say.
    """
    counts, region = csc_array(counts[region > 0], dtype=np.float64), region[region > 0]
    kept = [
        i for i in np.unique(region) if min((region == i).sum(), (region != i).sum()) >= MIN_SPOTS
    ]
    if not kept:
        return pd.DataFrame(columns=MARKER_COLUMNS)
    inside, total = region[:, None] == kept, counts.sum(axis=1)
    depth = np.where(total > 0, np.median(total) / np.maximum(total, 1e-9), 0)[:, None]
    parts = []
    for start in range(0, len(genes), GENES_AT_ONCE):
        raw = counts[:, start : start + GENES_AT_ONCE].toarray()
        values = raw * depth
        auc, p = rank_tests(np.round(values / TIE), inside)
        auc_counts, p_counts = rank_tests(raw, inside)
        within = inside.T @ values / inside.sum(0)[:, None]
        without = ~inside.T @ values / (~inside).sum(0)[:, None]
        fold = np.log2((within + PSEUDO_COUNT) / (without + PSEUDO_COUNT))
        named = [np.repeat(kept, values.shape[1])]
        named.append(np.tile(genes[start : start + GENES_AT_ONCE], len(kept)))
        measured = (within, without, fold, auc, p, auc_counts, p_counts)
        columns = [*named, *(a.ravel() for a in measured)]
        parts.append(pd.DataFrame(dict(zip(TESTED, columns, strict=True))))
    table = pd.concat(parts, ignore_index=True)
    for name in ("", "_counts"):
        table[f"q{name}"] = stats.false_discovery_control(table[f"p{name}"])
    both = (table["q"] < LEVEL) & (table["q_counts"] < LEVEL)
    table["higher"] = both & (table["auc"] > 0.5) & (table["auc_counts"] > 0.5)
    order = np.lexsort([table["gene"], -table["auc"], table["region"]])
    return table.iloc[order][MARKER_COLUMNS]


TESTED = [
    "region", "gene", "mean_within", "mean_without", "log2_fold", "auc", "p", "auc_counts",
    "p_counts",
]  # fmt: skip
MARKER_COLUMNS = [
    "region", "gene", "mean_within", "mean_without", "log2_fold", "auc", "p", "q", "auc_counts",
    "q_counts", "higher",
]  # fmt: skip


def best_markers(markers: pd.DataFrame, region: int, n: int) -> pd.DataFrame:
    """The first n genes that are higher in a region."""
    return markers[(markers["region"] == region) & markers["higher"].astype(bool)].head(n)


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def interpolated_components(
    centres: np.ndarray, counts: csr_array, tissue: np.ndarray, sigma_um: float
) -> np.ndarray:
    """What the spots alone tell: their principal components (superpixels, components) between them.

    Square roots of the counts by total, interpolated linearly.
    """
    total = np.maximum(counts.sum(axis=1), 1)[:, None]
    roots = np.sqrt(counts.toarray() * (np.median(total) / total))
    _, linear = interpolation_weights(centres, superpixel_centres(tissue.shape))
    maps = (linear @ roots).T.reshape(-1, *tissue.shape)
    return principal_components(maps.astype(np.float32), tissue, sigma_um)[0]


def agreement(partitions: list[np.ndarray]) -> dict | None:
    """ARI between every two partitions (superpixels,)."""
    aris = [regions.adjusted_rand(a, b) for a, b in combinations(partitions, 2)]
    if not aris:
        return None
    mean, lowest = rounded(np.mean(aris)), rounded(np.min(aris))
    return {"halves": len(partitions), "mean ARI": mean, "lowest ARI": lowest}


def compare_with_truth(
    stage: utils.Stage, labels: np.ndarray, centres: np.ndarray, counts: csr_array
) -> dict:
    """ARI with the true regions, of the labels and of what the spots alone tell."""
    args, tissue = stage.args, labels > 0
    true, _ = regions.read_true_regions(stage, labels.shape)
    scored = (true > 0) & tissue
    if not scored.any():
        raise stage.error(
            stage.directory / TRUTH, "has no true region on the tissue.", "Leave out --truth."
        )
    try:
        x = interpolated_components(centres, counts, tissue, args.smoothing_um)
    except QhullError as error:
        raise stage.error(
            stage.path(utils.LOCS),
            "has spots that lie on a line: there is no interpolation between them.",
            "Leave out --truth.",
        ) from error
    plain = by_k_means(x, tissue, args.n_regions, args.seed, np.ones(len(x), bool))
    plain = as_labels(plain, tissue, args.min_region_mm2)
    return {
        "regions": len(np.unique(true[scored])),
        "ARI": rounded(regions.adjusted_rand(labels[scored], true[scored])),
        "ARI of interpolated spots": rounded(regions.adjusted_rand(plain[scored], true[scored])),
    }


def report(table: pd.DataFrame, markers: pd.DataFrame, facts: dict) -> str:
    lines = [f"{'region':>6}{'mm2':>9}{'spots':>7}  genes that are higher in it (AUC)"]
    for row in table.itertuples():
        best = best_markers(markers, row.region, 5)
        genes = ", ".join(f"{g} {a:.2f}" for g, a in zip(best["gene"], best["auc"], strict=True))
        lines.append(f"{row.region:>6}{row.mm2:>9.3f}{row.spots:>7}  {genes or 'none at q < 0.05'}")
    if facts["stability"]:
        s = facts["stability"]
        lines.append(
            f"stability: ARI between partitions by {s['halves']} random halves of the tissue "
            f"{s['mean ARI']:.2f} in the mean, {s['lowest ARI']:.2f} at least"
        )
    if "truth" in facts:
        t = facts["truth"]
        lines.append(
            f"ARI with the {t['regions']} true regions: {t['ARI']:.3f}; k-means on interpolated "
            f"spots {t['ARI of interpolated spots']:.3f}"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = regions.parser_of(__doc__)
    option = parser.add_argument
    option("--method", choices=list(METHODS), default="kmeans", help="How; without it, kmeans.")
    option(
        "--n-regions",
        type=utils.positive,
        default=N_REGIONS,
        help=f"Number of kinds of region; without it, {N_REGIONS}.",
    )
    option(
        "--smoothing-um",
        type=regions.not_below_zero,
        default=SMOOTHING_UM,
        help=f"Sigma of the Gaussian in um; without it, {SMOOTHING_UM:g}. 0 is none.",
    )
    option(
        "--min-region-mm2",
        type=regions.not_below_zero,
        default=MIN_REGION_MM2,
        help=f"Smaller pieces are merged; without it, {MIN_REGION_MM2:g} mm2.",
    )
    option("--seed", type=utils.not_negative, default=0, help="Of the partition; without it, 0.")
    option(
        "--seeds",
        type=utils.positive,
        default=5,
        help="Halves of the tissue by which stability is measured; without it, 5. 1 is no measure.",
    )
    option("--truth", action="store_true", help="Compare with the regions of truth.npz.")
    return parser


def check_options(stage: utils.Stage) -> None:
    regions.check_output(stage)
    if stage.args.method == "leiden":
        try:
            import graspologic_native  # noqa: F401
        except ImportError as error:
            raise utils.StageError(
                "--method leiden needs graspologic-native, which is not installed.",
                "Run: pip install -r analysis/requirements.txt, or leave out --method.",
            ) from error


def run_segmentation(stage: utils.Stage) -> None:
    args = stage.args
    check_options(stage)
    stage.require(utils.EMBEDDINGS, utils.LOCS, utils.RADIUS, utils.CNTS)
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    counts, genes = tables.read_sparse_counts(stage, stage.path(utils.CNTS), locs.index)
    centres, radius = locs[["y", "x"]].to_numpy() / utils.TOKEN_PX, read_radius(stage.directory)

    embedding = read_embedding(stage)
    tissue = regions.tissue_of(stage, np.isfinite(embedding).all(0))
    if args.n_regions > tissue.sum():
        raise utils.StageError(
            f"--n-regions is {args.n_regions}; the tissue has {tissue.sum()} superpixels.",
            f"Run: python {SCRIPT} --directory {args.directory}",
        )
    x, explained = principal_components(embedding, tissue, args.smoothing_um)
    del embedding
    print(
        f"{len(x):,} superpixels of tissue, {x.shape[1]} components ({explained:.0%} of variance)"
    )
    cut, k = METHODS[args.method], args.n_regions
    whole = cut(x, tissue, k, args.seed, np.ones(len(x), bool))
    labels = as_labels(whole, tissue, args.min_region_mm2)
    seeds = [args.seed + i for i in range(args.seeds if args.seeds > 1 else 0)]
    halves = [cut(x, tissue, k, seed, half_of(tissue, seed)) for seed in seeds]
    n = int(labels.max())
    if n != k:
        stage.warn(f"{n} regions in place of {k}: --method and --min-region-mm2 gave no other")

    discs = disc_weights(centres, radius, tissue.shape)
    region, _ = regions.spot_labels(labels, discs)
    region[~on_tissue(discs, np.where(tissue, 1.0, np.nan), radius)] = 0
    markers = find_markers(counts, pd.Index(genes), region)
    untested = sorted({*range(1, n + 1)} - {*markers["region"]})
    if untested:
        stage.warn(f"no markers of region {utils.some(untested)}: under {MIN_SPOTS} spots")
    best = [best_markers(markers, i, NAMED)["gene"] for i in range(1, n + 1)]
    names = [", ".join(genes) for genes in best]
    size = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    table = pd.DataFrame(
        {
            "region": np.arange(1, n + 1),
            "superpixels": size,
            "mm2": size * regions.SUPERPIXEL_MM2,
            "share_of_tissue": size / size.sum(),
            "spots": np.bincount(region, minlength=n + 1)[1:],
            "colour": regions.label_colours(n),
            "genes": names,
        }
    )
    facts = {
        "method": args.method,
        "regions": n,
        "seed": args.seed,
        "tissue mm2": rounded(size.sum() * regions.SUPERPIXEL_MM2),
        "components": x.shape[1],
        "share of variance": rounded(explained),
        "stability": agreement(halves),
        "spots": int((region > 0).sum()),
        "markers": int(markers["higher"].sum()),
    }
    if args.truth:
        facts["truth"] = compare_with_truth(stage, labels, centres, counts)
    print(report(table, markers, facts))
    figures = {}
    if not args.no_plot:
        title = f"{n} regions by {TITLES[args.method]}"
        rgb = regions.read_colours(stage, tissue.shape)
        shown = [name or "no gene is higher" for name in names]
        figures["segments"] = regions.draw_labels(labels, shown, title, rgb)
    found = {"segments.csv": table, "markers.csv": markers}
    regions.write(stage, "segments", facts, {"segments": labels}, found, figures)


def main(argv: list[str] | None = None) -> int:
    return utils.run_stage(run_segmentation, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
