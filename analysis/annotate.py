"""Label the tissue by a table of marker genes, superpixel by superpixel.

    python analysis/annotate.py --directory data/section --markers markers.csv
    python analysis/annotate.py --directory data/section --markers markers.csv --spot-labels lbl.tsv
    python analysis/annotate.py --directory data/section --tissue breast    # markers that it brings

Reads   the table --markers, or with --tissue analysis/markers.csv, and the maps in cnts-super/;
        mask.png and Histology_rgb.npy if they are there; locs.csv and radius.txt with
        --spot-labels; locs.csv, cnts.csv and truth.npz with --truth.

Writes  annotation.npy             uint8 (rows, columns), 0 outside the tissue, else the number of a
                                   label in the order of the table; the last one is unclassified
        annotation.csv             area, colour and markers of every label
        annotation-scores.npy      float16 (labels, rows, columns)
        annotation-confidence.npy  float16 (rows, columns)
        annotation.png, annotation-scores.png, annotation-spots.csv and annotation-truth.csv (spots
        and superpixels of every pair of labels), annotate.json (the record)

--markers is a table with the columns gene and label, one row per marker. A gene may mark several
labels. A column weight is optional: it says how much a marker counts (1 without it). A gene that a
label must lack has a weight below 0. Gene names must match exactly.

--tissue takes the markers of a common tissue from analysis/markers.csv, in which every row names
its source; capitals do not matter. Only genes with a map count: put them into gene-names.txt before
you run get_HR.py and HISTEX.py. Where your tissue differs, copy the rows and edit them.

* The counts of each map are replaced by their square roots. These are scaled from 0 (the 5 % lowest
  superpixels of the tissue) to 1 (the 5 % highest), so that abundant genes do not outvote rare
  ones. With --smoothing-um, the map is then smoothed within the tissue.
* The score of a label is the mean of its markers minus the mean of all genes that have a map, as in
  scanpy's score_genes. (With negative weights: minus what as many random genes would give.) The
  label with the highest score wins.
* The score must be higher than chance. Random genes, as many as the label has and with the same
  weights, have a score with mean 0; its variance and skewness follow from those of all genes at the
  same superpixel. A gamma distribution with these moments (Pearson's type III) gives the
  probability that random genes stay below the score of the winner. This, to the power of the number
  of labels, is the confidence: the probability that the best of as many random sets stays below.
  Where it is below 1 - --chance-share, the superpixel is unclassified. So markers without any
  meaning label about --chance-share of the tissue, on average over many such tables. --chance-share
  1 labels all of it.

The confidence compares with chance, not with the second best label: annotation-scores.npy shows how
near that is. If most genes with a map are markers of one label, this label is hard to find, since
random genes are then often its markers. marker_correlation in annotation.csv is the mean
correlation between the maps of a label's markers. It should be well above that of all genes, which
is printed too. If it is not, the markers do not mark the same places.

The labels can be compared with others. --spot-labels is a table with the columns spot (the first
column, whatever its name) and label, such as labels.csv of prepare/legacy_st.py; or with x, y
(places on the array) and label, as her2st has it. A spot has the label under most of its disc.
--truth compares with the regions of truth.npz, and does the same for an annotation of linearly
interpolated spots. Two labels are the same if their names differ in capitals at most.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import files
from analysis import markers as builtin
from reading import cli

SCRIPT = "analysis/annotate.py"
CHANCE_SHARE = 0.05  # of the tissue, which markers without meaning may label


def build_parser() -> cli.Parser:
    parser = cli.stage_parser(__doc__)
    files.add_output(parser)
    option = parser.add_argument
    markers_help = "Table with the columns gene and label, and optionally weight."
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--markers", type=Path, help=markers_help)
    tissue_help = (
        "Use the marker genes of this tissue that come with HISTEX, in place of --markers."
    )
    either.add_argument("--tissue", choices=builtin.tissues(), help=tissue_help)
    share_help = (
        "How much of the tissue random genes, in place of the markers, may label: like a rate of "
        "false positives. A smaller share leaves more of the tissue unclassified; 1 leaves "
        "nothing unclassified."
    )
    share = cli.number(float, lambda x: 0 < x <= 1, "a number above 0, and 1 at most")
    option("--chance-share", type=share, default=CHANCE_SHARE, help=share_help)
    parser.alias("--level", "--chance-share")
    um_help = "Sigma in um of the Gaussian that smooths the maps; 0 does not smooth."
    option("--smoothing-um", type=cli.from_0, default=0.0, help=um_help)
    spots_help = (
        "Table of spots and their labels, to compare the result with (default: no comparison)."
    )
    option("--spot-labels", type=Path, help=spots_help)
    option("--truth", action="store_true", help="Compare with the true regions in truth.npz.")
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import pearson3

from analysis import regions, sheets
from analysis.inputs import map_files, read_first_map
from analysis.scores import rounded
from reading import tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNCLASSIFIED = "unclassified"
LOW, HIGH = 0.05, 0.95  # quantiles of a map that become 0 and 1
LARGEST_WEIGHT = 1e6
MOST_LABELS = 254  # with unclassified, they are numbered in uint8
PANELS_ABREAST = 4  # of annotation-scores.png
MOSTLY = 0.5  # of the tissue
FEW = 3  # markers of a label, with which it seldom exceeds chance
SMOOTHER_UM = 16.0  # two superpixels
BRIGHTEST = 99.5  # percentile of a score at which the colours end


# --------------------------------------------------------------------------------------------------
# tables
# --------------------------------------------------------------------------------------------------
def read_markers(path: Path) -> pd.DataFrame:
    """Columns gene, label and weight (float), a row per marker."""
    remedy = "Expected the columns gene and label, and perhaps weight, with a row per marker."

    def refuse(problem: str, remedy: str = remedy) -> utils.StageError:
        return utils.StageError(f"{path} {problem}", remedy)

    table = sheets.read_sheet(path, ["gene", "label"], refuse)
    if table.empty:
        raise refuse("holds no row below its header.")
    if "weight" not in table:
        table["weight"] = "1"
    table = table[["gene", "label", "weight"]]
    lacking = table.index[(table[["gene", "label"]] == "").any(axis=1)]
    if len(lacking):
        raise refuse(f"lacks a gene or a label in line {lacking[0]}.")
    weight = pd.to_numeric(table["weight"], errors="coerce")
    for line in weight.index[~(weight.abs() <= LARGEST_WEIGHT) | (weight == 0)]:
        found = table["weight"][line]
        raise refuse(f"has the weight {found!r} in line {line}; it must be a number and not 0.")
    for line in table.index[table.duplicated(["gene", "label"])]:
        gene, label = table.loc[line, ["gene", "label"]]
        first = table.index[(table["gene"] == gene) & (table["label"] == label)][0]
        raise refuse(
            f"gives {label} the gene {gene} in lines {first} and {line}.", "Take one of them out."
        )
    names = labels_of(table)
    if same := utils.duplicates(name.casefold() for name in [*names, UNCLASSIFIED]):
        raise refuse(
            f"has labels that differ in capitals alone, or are the name {UNCLASSIFIED!r}: "
            f"{utils.some(same)}.",
            "Give them other names.",
        )
    if len(names) > MOST_LABELS:
        problem = f"has {len(names)} labels; expected {MOST_LABELS} at most."
        raise refuse(problem, "Use fewer labels.")
    table = table.assign(weight=weight.astype(float))
    check_markers(path, table, names, "has")
    return table.reset_index(drop=True)


def labels_of(markers: pd.DataFrame) -> list[str]:
    """In the order of the table."""
    return markers["label"].unique().tolist()


def check_markers(path: Path, markers: pd.DataFrame, names: list[str], problem: str) -> None:
    """Every label needs a gene that marks its presence."""
    marked = {*markers["label"][markers["weight"] > 0]}
    if bare := [name for name in names if name not in marked]:
        raise utils.StageError(
            f"{path} {problem} no gene that marks {utils.some(bare)} (with a weight above 0).",
            f"Add genes to these labels or take them out. Only genes with a map count: those of "
            f"{utils.GENE_NAMES.name}. To have maps of more genes, add them to that file and run "
            f"{utils.HIGH_RESOLUTION} and {utils.HISTEX} again.",
        )


def builtin_markers(stage: utils.Stage, genes: list[str]) -> pd.DataFrame:
    """The markers of --tissue that have a map, as read_markers gives them."""
    tissue = stage.args.tissue
    rows, bare = builtin.markers_among(tissue, genes)
    if not rows:
        raise utils.StageError(
            f"{builtin.TABLE.name} has {len(builtin.rows_of(tissue))} markers of {tissue}; none of "
            f"them is among the {len(genes)} genes with a map, such as {utils.some(genes)}.",
            f"Add them to {utils.GENE_NAMES.name} and run {utils.HIGH_RESOLUTION} and "
            f"{utils.HISTEX} again, or give markers of your genes by --markers.",
        )
    if bare:
        stage.warn(f"none of the markers of these labels has a map: {', '.join(bare)}")
    return pd.DataFrame(rows)[["gene", "label"]].assign(weight=1.0)


def with_maps(stage: utils.Stage, markers: pd.DataFrame, genes: list[str]) -> pd.DataFrame:
    """The markers that have a map, with a warning about the others."""
    there = markers["gene"].isin(genes)
    kept, absent = markers[there], markers["gene"][~there].unique()
    if len(absent):
        n = markers["gene"].nunique()
        text = f"{len(absent)} of {n} markers have no map and are left out: {', '.join(absent)}"
        spelling = {gene.casefold(): gene for gene in genes}
        meant = [f"{g} as {spelling[g.casefold()]}" for g in absent if g.casefold() in spelling]
        if meant:
            text += f". With other capitals, there are {', '.join(meant)}"
        stage.warn(text)
    check_markers(stage.args.markers, kept, labels_of(markers), "has, among the genes with a map,")
    times = kept["label"].value_counts(sort=False)
    if (times == 1).any():
        alone = ", ".join(times.index[times == 1])
        stage.warn(f"a single marker seldom exceeds chance; these labels have one: {alone}")
    return kept


def weight_table(markers: pd.DataFrame, names: list[str], genes: list[str]) -> np.ndarray:
    """Weights (labels, genes), 0 for what is no marker."""
    table = markers.pivot(index="label", columns="gene", values="weight")
    return table.reindex(index=names, columns=genes).fillna(0).to_numpy()


# --------------------------------------------------------------------------------------------------
# scores
# --------------------------------------------------------------------------------------------------
def scaled(image: np.ndarray, tissue: np.ndarray, sigma_um: float) -> np.ndarray | None:
    """Values (superpixels of the tissue,) from 0 to 1, smoothed; None for a constant map."""
    roots = np.sqrt(image[tissue].astype(np.float32))
    low, high = np.quantile(roots, [LOW, HIGH])
    if high - low <= np.finfo(np.float32).eps * high:
        return None
    values = ((roots - low) / (high - low)).clip(0, 1)
    if sigma_um == 0:
        return values
    whole = np.zeros(tissue.shape, np.float32)
    whole[tissue] = values
    return regions.smooth(whole, tissue, sigma_um)[tissue]


class Sums(NamedTuple):
    """What is added up over the genes, one at a time, so that no two are in memory."""

    used: np.ndarray  # (genes,) bool: those whose map is not constant
    total: np.ndarray  # (superpixels,) of the scaled maps
    squares: np.ndarray  # (superpixels,)
    cubes: np.ndarray  # (superpixels,)
    marked: np.ndarray  # (labels, superpixels), weighted
    sd: np.ndarray  # (genes,) of the scaled maps over the tissue


def add_up(
    images: Iterable[np.ndarray], weights: np.ndarray, tissue: np.ndarray, sigma_um: float
) -> Sums:
    """Images (rows, columns) are those of the columns of ``weights`` (labels, genes)."""
    n_labels, n_genes = weights.shape
    n = int(tissue.sum())
    total, squares, cubes = np.zeros((3, n))
    marked = np.zeros((n_labels, n), np.float32)
    sums = Sums(np.ones(n_genes, bool), total, squares, cubes, marked, np.zeros(n_genes))
    for gene, image in enumerate(images):
        values = scaled(image, tissue, sigma_um)
        sums.used[gene] = values is not None
        if values is None:
            continue
        sums.sd[gene] = values.std(dtype=np.float64)
        total += values
        squares += values**2
        cubes += values**3
        for label in np.flatnonzero(weights[:, gene]):
            marked[label] += np.float32(weights[label, gene]) * values
    return sums


class Annotation(NamedTuple):
    best: np.ndarray  # (superpixels,) number of the label with the highest score, from 0
    confidence: np.ndarray  # (superpixels,) float32
    scores: np.ndarray  # (labels, superpixels) float32


def choose_labels(sums: Sums, weights: np.ndarray) -> Annotation:
    """The winners, and how often the best of as many random sets of genes stays below them."""
    weights = weights[:, sums.used]
    n_labels, n = weights.shape[0], max(weights.shape[1], 1)
    mean = sums.total / n
    variance = (sums.squares / n - mean**2).clip(0)
    third = sums.cubes / n - 3 * mean * variance - mean**3
    best = np.zeros(len(mean), np.int64)
    highest, z, skewness = np.full(len(mean), -np.inf), np.zeros(len(mean)), np.zeros(len(mean))
    scores = sums.marked
    for label in range(n_labels):
        size = np.abs(weights[label]).sum()
        if size == 0:  # none of its genes varies
            scores[label] = np.nan
            continue
        score = (sums.marked[label] - weights[label].sum() * mean) / size
        of_variance, of_third = drawn_moments(weights[label])
        sd = np.sqrt(variance * of_variance)
        known = sd > np.finfo(np.float32).eps * size
        wins = score > highest
        best[wins], highest[wins] = label, score[wins]
        for found, of_label, unit in ((z, score * size, sd), (skewness, third * of_third, sd**3)):
            found[wins] = np.divide(of_label, unit, out=np.zeros(len(mean)), where=known)[wins]
        scores[label] = score
    confidence = pearson3.cdf(z, skewness) ** n_labels
    return Annotation(best, confidence.astype(np.float32), scores)


def drawn_moments(weights: np.ndarray) -> tuple[float, float]:
    """Second and third moment of a weighted sum of genes, for each gene of those of all genes.

    The weights (genes,) go to genes drawn without replacement. From a gene that was drawn follows
    a little about the others: of N values that add up to 0, the product of two has the mean
    -m2 / (N - 1), that of one and another one's square -m3 / (N - 1), that of three
    2 m3 / ((N - 1) (N - 2)).
    """
    n = max(len(weights), 2)  # of one gene, both are its own
    one, two, three = ((weights**power).sum() for power in (1, 2, 3))
    second = two - (one**2 - two) / (n - 1)
    triples = one**3 - 3 * one * two + 2 * three
    third = three - 3 * (one * two - three) / (n - 1) + 2 * triples / ((n - 1) * max(n - 2, 1))
    return float(second), float(third)


def marker_correlations(sums: Sums, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean correlation between the markers of each label (labels,), and between all genes.

    It is weighted by their standard deviations; NaN for a single marker. Before ``choose_labels``.
    """
    sets = np.vstack([weights, np.ones(weights.shape[1])])
    variance = np.append(sums.marked.var(axis=1, dtype=np.float64), sums.total.var())
    own = (sets**2) @ sums.sd**2
    most = (np.abs(sets) @ sums.sd) ** 2 - own
    several = (sets != 0) @ (sums.sd > 0).astype(int) > 1
    found = np.where(several, (variance - own) / np.where(several, most, 1), np.nan)
    return found[:-1], float(found[-1])


def annotate(
    images: Iterable[np.ndarray], weights: np.ndarray, tissue: np.ndarray, sigma_um: float
) -> Annotation:
    return choose_labels(add_up(images, weights, tissue, sigma_um), weights)


def label_image(found: Annotation, tissue: np.ndarray, chance_share: float) -> np.ndarray:
    """uint8 (rows, columns): 0 outside the tissue, the label from 1, the last one unclassified."""
    labels = np.zeros(tissue.shape, np.uint8)
    none = len(found.scores) + 1
    labels[tissue] = np.where(found.confidence >= 1 - chance_share, found.best + 1, none)
    return labels


# --------------------------------------------------------------------------------------------------
# comparisons
# --------------------------------------------------------------------------------------------------
def read_spot_labels(path: Path, spots: pd.Index) -> tuple[pd.Series, int]:
    """Labels by spot id, those of ``spots`` alone; how many rows are of other spots."""
    remedy = "Expected the columns spot and label, or x, y and label as her2st has them."

    def refuse(problem: str) -> utils.StageError:
        return utils.StageError(f"{path} {problem}", remedy)

    table = sheets.read_sheet(path, ["label"], refuse)
    if table.empty:
        raise refuse("holds no row below its header.")
    ids = table.iloc[:, 0]
    if not ids.isin(spots).any() and {"x", "y"} <= set(table):
        x, y = (sheets.numbers_in(table, column, refuse) for column in ("x", "y"))
        ids = pd.Series([f"{a:.0f}x{b:.0f}" for a, b in zip(x, y, strict=True)])
    labels = pd.Series(table["label"].to_numpy(), index=ids.to_numpy())
    labels = labels[labels != ""]
    here = labels[labels.index.isin(spots)]
    if repeated := utils.duplicates(here.index):
        raise refuse(f"labels the spots {utils.some(repeated)} more than once.")
    if here.empty:
        raise utils.StageError(
            f"{path} labels the spots {utils.some(labels.index)}; {utils.LOCS.name} has "
            f"{utils.some(spots)}.",
            "Give the labels of this section.",
        )
    return here, len(labels) - len(here)


def agreement(given: np.ndarray, found: np.ndarray, names: list[str]) -> dict[str, Any]:
    """How far labels ``found`` (n,), numbers of ``names`` from 1, agree with the names ``given``.

    The ARI is over all; what is unclassified counts as one more label there. The accuracy is over
    those whose given name is among the labels, and counts the unclassified as wrong.
    """
    numbers = {name.casefold(): i for i, name in enumerate(names, start=1)}
    expected = np.array([numbers.get(name.casefold(), 0) for name in given])
    facts = {"n": len(given), "ARI": rounded(regions.adjusted_rand(given, found))}
    known = expected > 0
    facts["of the labels"] = int(known.sum())
    if known.any():
        right, sure = (found == expected)[known], (found <= len(names))[known]
        of_each = [right[expected[known] == i].mean() for i in np.unique(expected[known])]
        facts |= {
            "unclassified": rounded(1 - sure.mean()),
            "accuracy": rounded(right.mean()),
            "accuracy of the classified": rounded(right[sure].mean()) if sure.any() else None,
            "balanced accuracy": rounded(float(np.mean(of_each))),
        }
    return facts


def contingency(given: np.ndarray, found: np.ndarray, names: list[str]) -> pd.DataFrame:
    """A row per name given, a column per label: how often the two meet."""
    labels = pd.Categorical.from_codes(found - 1, pd.Index([*names, UNCLASSIFIED]))
    table = pd.crosstab(pd.Series(given, name="given"), labels, dropna=False)
    return table.rename_axis(columns=None).reset_index()


def compare_spots(
    stage: utils.Stage, labels: np.ndarray, names: list[str]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Agreement with --spot-labels, and the table of pairs."""
    path = stage.args.spot_labels
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    given, others = read_spot_labels(path, locs.index)
    if others:
        stage.warn(f"{path.name}: {others} labels are of spots that are not in {utils.LOCS.name}")
    discs, _ = regions.discs_of(stage, regions.centres_of(locs.loc[given.index]), labels > 0)
    found, _ = regions.spot_labels(labels, discs)
    on = found > 0
    if not on.any():
        problem = "labels no spot on the tissue."
        raise utils.StageError(f"{path} {problem}", "Give the labels of this section.")
    pair = given.to_numpy(str)[on], found[on]
    facts = {"labelled spots on the tissue": int(on.sum()), **agreement(*pair, names)}
    return facts, contingency(*pair, names)


def interpolated_maps(
    stage: utils.Stage, genes: list[str], tissue: np.ndarray
) -> Iterator[np.ndarray]:
    """Counts of the spots, interpolated linearly: one image (rows, columns) per gene."""
    spots = regions.read_measured_spots(stage)
    column = regions.columns_of(stage, spots.genes, genes)
    linear = regions.interpolation_of(stage, spots.centres, tissue)
    counts = spots.counts.tocsc()
    for i in column:
        image = (linear @ counts[:, [i]].toarray()).reshape(tissue.shape)
        yield image.clip(0)  # rounding can make it negative


def compare_truth(
    stage: utils.Stage, tissue: np.ndarray, labels: dict[str, np.ndarray], names: list[str]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Agreement of labels (rows, columns) by method with the true regions; the table of pairs."""
    true, true_names = regions.read_true_regions(stage, tissue.shape)
    scored = (true > 0) & tissue
    given = np.array(true_names)[true[scored]]
    if not {name.casefold() for name in given} & {name.casefold() for name in names}:
        raise utils.StageError(
            f"No label of {stage.args.markers} is the name of a true region: "
            f"{utils.some(np.unique(given))}.",
            "Name labels as the regions are named, or leave --truth out.",
        )
    found = {method: image[scored].astype(int) for method, image in labels.items()}
    facts = {method: agreement(given, numbers, names) for method, numbers in found.items()}
    pairs = {method: contingency(given, numbers, names) for method, numbers in found.items()}
    return facts, pd.concat(pairs, names=["method"]).reset_index("method").reset_index(drop=True)


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def on_grid(values: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """float16 (..., rows, columns) of values (..., superpixels), NaN outside the tissue."""
    image = np.full((*values.shape[:-1], *tissue.shape), np.nan, np.float16)
    image[..., tissue] = values
    return image


def describe(
    labels: np.ndarray,
    names: list[str],
    weights: np.ndarray,
    together: np.ndarray,
    found: Annotation,
) -> pd.DataFrame:
    """annotation.csv: a row per label, in order, unclassified last."""
    n = len(names) + 1
    columns = regions.areas(labels, n)
    sure = np.bincount(labels[labels > 0], found.confidence, n + 1)[1:]
    size = columns["superpixels"]
    return pd.DataFrame(
        {
            "label": np.arange(1, n + 1),
            "name": [*names, UNCLASSIFIED],
            "markers": np.append((weights != 0).sum(1), 0),
            "marker_correlation": np.append(together, np.nan),
            **columns,
            "mean_confidence": np.where(size > 0, sure / np.maximum(size, 1), np.nan),
            "colour": regions.label_colours(n, grey=n),
        }
    )


def draw_scores(scores: np.ndarray, names: list[str], markers: list[list[str]]) -> Figure:
    """A map per label: 0 is what genes drawn at random have; each has colours of its own."""
    from matplotlib.figure import Figure

    across = min(PANELS_ABREAST, len(names))
    down = -(-len(names) // across)
    rows, columns = scores.shape[1:]
    height = 3.4 * rows / columns + 0.75  # inches
    figure = Figure(figsize=(3.9 * across, height * down + 0.2), layout="constrained", dpi=110)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, name, image, genes in zip(axes, names, scores, markers, strict=False):
        image = image.astype(np.float32)
        top = max(float(np.nanpercentile(image, BRIGHTEST)), 1e-3)
        drawn = ax.imshow(image, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
        more = f" and {len(genes) - 3} more" if len(genes) > 4 else ""
        shown = genes if len(genes) <= 4 else genes[:3]
        regions.bare(ax, f"{name}\n{', '.join(shown)}{more}")
        figure.colorbar(drawn, ax=ax, shrink=0.7, extend="both")
    for ax in axes[len(names) :]:
        ax.axis("off")
    for ax in axes[: len(names)]:
        regions.add_scale_bar(ax, (rows, columns))  # on each, so that all have the same room
    return figure


def check_inputs(stage: utils.Stage) -> None:
    """Before any work: what is needed is there, what is written is not the user's."""
    args = stage.args
    comparisons = {files.ANNOTATION_SPOTS: args.spot_labels, files.ANNOTATION_TRUTH: args.truth}
    files.guard_outputs(stage, *(table for table, asked in comparisons.items() if not asked))
    of_spots = [utils.LOCS, utils.RADIUS] if args.spot_labels else []
    of_truth = [utils.LOCS, utils.CNTS] if args.truth else []
    stage.require(utils.MAPS, *of_spots, *of_truth)


def check_genes(
    stage: utils.Stage, markers: pd.DataFrame, genes: list[str], used: np.ndarray
) -> None:
    """Enough genes must vary over the tissue: those of a label, and others to compare with."""
    varying, names = {*np.array(genes)[used]}, labels_of(markers)
    kept = markers[markers["gene"].isin(varying)]
    if constant := sorted({*markers["gene"]} - varying):
        stage.warn(f"left out, since their maps are the same everywhere: {', '.join(constant)}")
    check_markers(stage.args.markers, kept, names, "has, among the genes whose map varies,")
    for name in names:
        own = {*kept["gene"][kept["label"] == name]}
        if own == varying:
            raise utils.StageError(
                f"{stage.args.markers} gives {name} all {len(own)} genes whose map varies: there "
                f"is no other gene to compare with.",
                "Give the label fewer genes, or make maps of more.",
            )


def draw_labels(
    stage: utils.Stage, labels: np.ndarray, confidence: np.ndarray, names: list[str]
) -> Figure:
    """Labels and confidence (rows, columns) beside the H&E."""
    title = f"{len(names)} labels by marker genes"
    text = f"confidence; below {1 - stage.args.chance_share:g}, unclassified"
    rgb, extra = regions.read_colours(stage, labels.shape), (confidence.astype(np.float32), text)
    every = [*names, UNCLASSIFIED]
    middle = 1 - stage.args.chance_share
    return regions.draw_labels(labels, every, title, rgb, extra, grey=len(every), middle=middle)


def compare(
    stage: utils.Stage, labels: np.ndarray, names: list[str], weights: np.ndarray, genes: list[str]
) -> dict[str, Any]:
    """Save the tables of --spot-labels and --truth; what the record says about them."""
    args, tissue, facts = stage.args, labels > 0, {}
    if args.spot_labels:
        facts["spots"], table = compare_spots(stage, labels, names)
        regions.save(stage, {files.ANNOTATION_SPOTS: table})
    if args.truth:
        images = interpolated_maps(stage, genes, tissue)
        plain = annotate(images, weights, tissue, args.smoothing_um)
        interpolated = label_image(plain, tissue, args.chance_share)
        methods = {"maps": labels, "interpolated spots": interpolated}
        facts["truth"], table = compare_truth(stage, tissue, methods, names)
        regions.save(stage, {files.ANNOTATION_TRUTH: table})
    return facts


def advise(table: pd.DataFrame, args: argparse.Namespace) -> str:
    """What to try where most of the tissue is unclassified; empty where it is not."""
    share = float(table["share_of_tissue"].iloc[-1])
    if share <= MOSTLY:
        return ""
    few = table["name"][:-1][table["markers"][:-1] < FEW].tolist()
    lines = [f"{share:.0%} of the tissue is unclassified. What to try:"]
    if few:
        lines.append(f"  more markers with a map for the labels that have fewer than {FEW}: "
                     f"{', '.join(few)}")  # fmt: skip
    lines.append("  labels for all that the tissue holds: what has no label is unclassified")
    if args.smoothing_um < SMOOTHER_UM:
        lines.append(f"  --smoothing-um {SMOOTHER_UM:g}: less noise, and less detail")
    lines.append(
        f"  --chance-share {min(1.0, 4 * args.chance_share):g}: more labels, of which more are by "
        f"chance"
    )
    lines.append(
        "  other markers where marker_correlation is no higher than that of all genes: they do not "
        "mark the same places"
    )
    return "\n".join(lines)


def make_annotation(stage: utils.Stage) -> None:
    args = stage.args
    check_inputs(stage)
    maps = map_files(stage.directory)
    genes = list(maps)
    if args.tissue:
        args.markers = builtin.TABLE  # which messages name
        stage.use(args.markers)
        markers = with_maps(stage, builtin_markers(stage, genes), genes)
    else:
        markers = with_maps(stage, read_markers(args.markers), genes)
    names = labels_of(markers)
    weights = weight_table(markers, names, genes)
    tissue = regions.tissue_of(stage, np.isfinite(read_first_map(stage, maps)[0]))
    print(f"{tissue.sum():,} superpixels of tissue, {len(genes)} genes, {len(names)} labels")

    images = (regions.read_checked(stage, path, tissue) for path in maps.values())
    sums = add_up(images, weights, tissue, args.smoothing_um)
    check_genes(stage, markers, genes, sums.used)
    weights = np.where(sums.used, weights, 0)
    together, overall = marker_correlations(sums, weights)
    found = choose_labels(sums, weights)
    del sums
    labels = label_image(found, tissue, args.chance_share)
    table = describe(labels, names, weights, together, found)
    facts = {
        "labels": len(names),
        "genes": len(genes),
        "markers": int((weights != 0).any(0).sum()),
        "chance share": args.chance_share,
        "smoothing um": args.smoothing_um,
        "tissue mm2": rounded(table["mm2"].sum()),
        "unclassified": rounded(table["share_of_tissue"].iloc[-1]),
        "median confidence": rounded(float(np.median(found.confidence))),
        "mean correlation of all genes": rounded(overall),
        **compare(stage, labels, names, weights, genes),
    }
    if args.tissue:
        facts["sources of markers"] = sorted({r["source"] for r in builtin.rows_of(args.tissue)})
    regions.print_table(table)
    regions.print_facts(facts)
    if advice := advise(table, args):
        print(advice)
    scores, confidence = on_grid(found.scores, tissue), on_grid(found.confidence, tissue)
    outputs: dict[utils.Artifact, Any] = {
        files.ANNOTATION: labels,
        files.ANNOTATION_TABLE: table,
        files.ANNOTATION_SCORES: scores,
        files.ANNOTATION_CONFIDENCE: confidence,
    }
    if not args.no_plot:
        own = [markers["gene"][markers["label"] == name].tolist() for name in names]
        outputs[files.ANNOTATION_PICTURE] = draw_labels(stage, labels, confidence, names)
        outputs[files.ANNOTATION_SCORES_PICTURE] = draw_scores(scores, names, own)
    regions.save(stage, outputs)
    stage.finish(**facts)


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(make_annotation, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
