"""Segment the tissue into regions of similar expression, at the resolution of the maps.

    python analysis/segment.py --directory data/section
    python analysis/segment.py --directory data/section --method leiden --n-regions 12

Reads   embeddings-gene.pickle, locs.csv, radius.txt, cnts.csv; mask.png and Histology_rgb.npy if
        they are there; truth.npz with --truth.

Writes  segments.npy         uint8 or uint16 (rows, columns), 0 for no region
        segments.csv         area, colour and first markers of every region
        segment-markers.csv  a row per gene and region: fold change, AUC, p and q
        segments.png         the regions beside the H&E
        segment.json         the record, with the stability; with --truth, also how well the regions
                             agree with the true ones

The regions are made from the latent maps of HISTEX.py (embeddings-gene.pickle), which describe the
spots and the histology by 128 numbers per superpixel. They are smoothed within the tissue (Gaussian
of ``--smoothing-um``) and reduced to the principal components that hold 95 % of the variance. Then
one of three methods divides the superpixels:

* kmeans: the best of several starts (k-means++), fitted to 50,000 superpixels drawn at random.
* hierarchical: k-means with 100 centres, which Ward's method joins to regions. The regions form a
  tree: those of a small ``--n-regions`` contain those of a larger one.
* leiden: the nodes of a graph are blocks of superpixels, at most 20,000. Each is joined to its 15
  nearest in expression; a weight says how many neighbours the two share. The script searches the
  resolution of Leiden's method that gives the number of regions asked for.

Connected pieces smaller than ``--min-region-mm2`` are merged into the region with which they share
the longest border. Regions are numbered by their area. What lies outside mask.png has no region.

The number of regions is your choice, not a finding. The stability tells how far to trust it: the
partition is made again ``--n-halves`` times, each time from a random half of the tissue (squares of
200 um), and extended to all of it. The adjusted Rand index (ARI) of two partitions is 1 if they
agree and 0 if they agree as by chance. If the mean ARI is under about 0.8, borders depend on
chance: try fewer regions, or more smoothing. A high ARI says that the cut can be repeated. It does
not say that the border is sharp: a gradient can be cut just as stably.

Marker genes. The superpixels of a map are not independent observations. So genes are tested at the
measured spots, with all genes of cnts.csv; a spot belongs to the region under most of its disc.
Counts are divided by the total of the spot and multiplied by the median total. The table holds the
log2 fold change of the means, inside against outside (0.05 counts are added to both); the AUC
(probability that a spot inside has more than a spot outside; 0.5 is chance); p of the two-sided
Mann-Whitney test; and q by Benjamini and Hochberg over all genes and regions. auc_counts and
q_counts are those of the raw counts. A gene is ``higher`` in a region if both AUC are above 0.5 and
both q below 0.05. The share alone would not do: where there are few counts, as in fat, even a gene
that is the same everywhere makes up more of them. Nor would the counts: where there are many, every
gene has more. The regions were found in the same counts: q ranks genes, and does not prove that the
region exists.

--truth: the record holds the ARI with the regions of truth.npz, beside that of k-means on linearly
interpolated spots.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import files
from reading import cli

SCRIPT = "analysis/segment.py"
METHODS = {"kmeans": "k-means", "hierarchical": "Ward's method", "leiden": "Leiden's method"}
N_REGIONS, N_HALVES = 8, 5
SMOOTHING_UM = 8.0  # more of it makes rings, of what lies between two kinds of tissue
MIN_REGION_MM2 = 0.005


def build_parser() -> cli.Parser:
    parser = cli.stage_parser(__doc__)
    files.add_output(parser)
    option = parser.add_argument
    option("--method", choices=list(METHODS), default="kmeans", help="How to divide the tissue.")
    n_help = "How many kinds of region to find."
    option("--n-regions", type=cli.positive, default=N_REGIONS, help=n_help)
    um_help = "Sigma in um of the Gaussian that smooths the latent maps; 0 does not smooth."
    option("--smoothing-um", type=cli.from_0, default=SMOOTHING_UM, help=um_help)
    mm2_help = "Area in mm2; smaller pieces are merged into a neighbouring region."
    option("--min-region-mm2", type=cli.from_0, default=MIN_REGION_MM2, help=mm2_help)
    option("--seed", type=cli.not_negative, default=0, help="Seed of the random numbers.")
    halves_help = (
        "Number of random halves of the tissue used to measure stability: 2 or more, or 1 to skip "
        "the measurement."
    )
    option("--n-halves", type=cli.positive, default=N_HALVES, help=halves_help)
    parser.alias("--seeds", "--n-halves")
    option("--truth", action="store_true", help="Compare with the true regions in truth.npz.")
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

from itertools import combinations

import cv2
import numpy as np
import pandas as pd
from scipy import stats
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.cluster.vq import vq
from scipy.sparse import csc_array, csr_array
from scipy.spatial import cKDTree

from analysis import inputs, regions
from analysis.inputs import TRUTH
from analysis.scores import rounded

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
MAX_Q = 0.05
NAMED = 3  # genes a region in the picture


# --------------------------------------------------------------------------------------------------
# features
# --------------------------------------------------------------------------------------------------
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
def k_means(x: np.ndarray, k: int, seed: int, starts: int = STARTS) -> np.ndarray:
    """Centres (k, dims) of the best of several starts, fitted to at most FITTED rows of x."""
    rng = np.random.default_rng(seed)
    if len(x) > FITTED:
        x = x[np.sort(rng.choice(len(x), FITTED, replace=False))]
    if len(x) == 1:
        return x  # which cv2 would take for several points of one dimension
    cv2.setRNGSeed(seed)
    kind = cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER
    until = (kind, MOST_STEPS, float(SETTLED * x.std()))
    x, labels = np.ascontiguousarray(x), np.empty((len(x), 1), np.int32)
    return np.asarray(cv2.kmeans(x, k, labels, until, starts, cv2.KMEANS_PP_CENTERS)[2])


def by_k_means(
    x: np.ndarray, tissue: np.ndarray, k: int, seed: int, fitted: np.ndarray
) -> np.ndarray:
    """Partition (superpixels,) by numbers from 0, by what is ``fitted`` (superpixels,) of it."""
    some = x[fitted]
    return vq(x, k_means(some, min(k, len(some)), seed))[0]


def by_ward(x: np.ndarray, tissue: np.ndarray, k: int, seed: int, fitted: np.ndarray) -> np.ndarray:
    some = x[fitted]
    centres = k_means(some, min(max(WARD_CENTRES, k), len(some)), seed, starts=1)
    joined = fcluster(linkage(centres, "ward"), k, "maxclust") - 1 if len(centres) > 1 else [0]
    return np.asarray(joined)[vq(x, centres)[0]]


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
    """Partition (n,) of rows; of all resolutions tried, the one that gives nearest to k parts."""
    from graspologic_native import leiden_csr

    graph = shared_neighbours(x)
    parts = graph.indptr.astype(np.int64), graph.indices.astype(np.int32), graph.data
    low, high = 1e-3, 10.0
    tried: list[np.ndarray] = []
    for _ in range(SEARCHES):
        resolution = float(np.sqrt(low * high))
        _, found = leiden_csr(*parts, len(x), resolution=resolution, iterations=ROUNDS, seed=seed)
        tried.append(np.array([found[node] for node in range(len(x))]))
        n = tried[-1].max() + 1
        if n == k:
            break
        low, high = (resolution, high) if n < k else (low, resolution)
    return min(tried, key=lambda partition: abs(partition.max() + 1 - k))


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


CUTS = {"kmeans": by_k_means, "hierarchical": by_ward, "leiden": by_leiden}


def label_regions(partition: np.ndarray, tissue: np.ndarray, min_mm2: float) -> np.ndarray:
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
    pairs, untied = first * (n - first), np.apply_along_axis(stats.tiecorrect, 0, ranks)
    sd = np.sqrt(pairs * (n + 1) / 12 * untied)
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
    both = (table["q"] < MAX_Q) & (table["q_counts"] < MAX_Q)
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
    stage: utils.Stage, spots: regions.MeasuredSpots, tissue: np.ndarray
) -> np.ndarray:
    """What the spots alone tell: principal components (superpixels, components) between them.

    Square roots of the counts by total, interpolated linearly.
    """
    total = np.maximum(spots.counts.sum(axis=1), 1)[:, None]
    roots = np.sqrt(spots.counts.toarray() * (np.median(total) / total))
    linear = regions.interpolation_of(stage, spots.centres, tissue)
    maps = (linear @ roots).astype(np.float32).T.reshape(-1, *tissue.shape)
    return principal_components(maps, tissue, stage.args.smoothing_um)[0]


def stability_of(partitions: list[np.ndarray]) -> dict[str, float | None] | None:
    """ARI between every two partitions (superpixels,); None if there are fewer than two."""
    aris = [regions.adjusted_rand(a, b) for a, b in combinations(partitions, 2)]
    if not aris:
        return None
    mean, lowest = rounded(float(np.mean(aris))), rounded(min(aris))
    return {"halves": len(partitions), "mean ARI": mean, "lowest ARI": lowest}


def compare_with_truth(
    stage: utils.Stage, labels: np.ndarray, spots: regions.MeasuredSpots
) -> dict[str, float | None]:
    """ARI with the true regions, of the labels and of what the spots alone tell."""
    args, tissue = stage.args, labels > 0
    true, _ = regions.read_true_regions(stage, labels.shape)
    scored = (true > 0) & tissue
    if not scored.any():
        raise stage.error(
            stage.directory / TRUTH, "has no true region on the tissue.", "Leave out --truth."
        )
    x = interpolated_components(stage, spots, tissue)
    plain = by_k_means(x, tissue, args.n_regions, args.seed, np.ones(len(x), bool))
    plain = label_regions(plain, tissue, args.min_region_mm2)
    return {
        "regions": len(np.unique(true[scored])),
        "ARI": rounded(regions.adjusted_rand(labels[scored], true[scored])),
        "ARI of interpolated spots": rounded(regions.adjusted_rand(plain[scored], true[scored])),
    }


def describe(labels: np.ndarray, region: np.ndarray, markers: pd.DataFrame) -> pd.DataFrame:
    """segments.csv: a row per region; ``region`` (spots,) is that of each spot, 0 for none."""
    n = int(labels.max())
    return pd.DataFrame(
        {
            "region": np.arange(1, n + 1),
            **regions.areas(labels, n),
            "spots": np.bincount(region, minlength=n + 1)[1:],
            "colour": regions.label_colours(n),
            "genes": [", ".join(best_markers(markers, i + 1, NAMED)["gene"]) for i in range(n)],
        }
    )


def check_inputs(stage: utils.Stage) -> None:
    """Before any work: what is needed is there, what is written is not the user's."""
    files.guard_outputs(stage)
    if stage.args.method == "leiden" and importlib.util.find_spec("graspologic_native") is None:
        raise utils.StageError(
            "--method leiden needs graspologic-native, which is not installed.",
            "Run: pip install -r analysis/requirements.txt, or leave out --method.",
        )
    stage.require(utils.EMBEDDINGS, utils.LOCS, utils.RADIUS, utils.CNTS)


def make_partitions(
    stage: utils.Stage, x: np.ndarray, tissue: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The partition (superpixels,) by all of the tissue, and those by its random halves."""
    args, cut = stage.args, CUTS[stage.args.method]
    whole = cut(x, tissue, args.n_regions, args.seed, np.ones(len(x), bool))
    seeds = range(args.seed, args.seed + args.n_halves) if args.n_halves > 1 else ()
    halves = [cut(x, tissue, args.n_regions, seed, half_of(tissue, seed)) for seed in seeds]
    return whole, halves


def make_segments(stage: utils.Stage) -> None:
    args = stage.args
    check_inputs(stage)
    spots = regions.read_measured_spots(stage)
    embedding = inputs.read_embedding(stage)
    tissue = regions.tissue_of(stage, np.isfinite(embedding).all(0))
    if args.n_regions > tissue.sum():
        raise utils.StageError(
            f"--n-regions is {args.n_regions}; the tissue has {tissue.sum()} superpixels.",
            "Ask for fewer.",
        )
    x, explained = principal_components(embedding, tissue, args.smoothing_um)
    del embedding
    print(f"{len(x):,} superpixels, {x.shape[1]} components ({explained:.0%} of the variance)")
    whole, halves = make_partitions(stage, x, tissue)
    labels = label_regions(whole, tissue, args.min_region_mm2)
    n = int(labels.max())
    if n != args.n_regions:
        stage.warn(
            f"{n} regions in place of {args.n_regions}: --method and --min-region-mm2 gave no other"
        )
    discs, on_tissue = regions.discs_of(stage, spots.centres, tissue)
    region = np.where(on_tissue, regions.spot_labels(labels, discs)[0], 0)
    markers = find_markers(spots.counts, spots.genes, region)
    if untested := sorted({*range(1, n + 1)} - {*markers["region"]}):
        stage.warn(f"no markers of region {utils.some(untested)}: under {MIN_SPOTS} spots")
    table = describe(labels, region, markers)
    facts = {
        "method": args.method,
        "regions": n,
        "seed": args.seed,
        "tissue mm2": rounded(table["mm2"].sum()),
        "components": x.shape[1],
        "share of variance": rounded(explained),
        "stability": stability_of(halves),
        "spots": int((region > 0).sum()),
        "markers": int(markers["higher"].sum()),
    }
    if args.truth:
        facts["truth"] = compare_with_truth(stage, labels, spots)
    regions.print_table(table)
    regions.print_facts(facts)
    outputs = {files.SEGMENTS: labels, files.SEGMENT_TABLE: table, files.SEGMENT_MARKERS: markers}
    if not args.no_plot:
        title = f"{n} regions by {METHODS[args.method]}"
        names = [genes or "no gene is higher" for genes in table["genes"]]
        rgb = regions.read_colours(stage, tissue.shape)
        outputs[files.SEGMENT_PICTURE] = regions.draw_labels(labels, names, title, rgb)
    regions.save(stage, outputs)
    stage.finish(**facts)


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(make_segments, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
