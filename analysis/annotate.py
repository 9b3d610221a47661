"""Name the tissue by a table of marker genes, superpixel by superpixel.

    python analysis/annotate.py --directory data/section --markers markers.csv
    python analysis/annotate.py --directory data/section --markers markers.csv --spot-labels lbl.tsv

--markers is a table with the columns gene and label, a row per marker; a gene may mark several
labels. A column weight, if there is one, says how much a marker counts (without it, 1); what a
label must lack has a weight below 0. Genes are matched by their exact names.

* Every map is turned into square roots of its counts, and these into a scale from 0 (the 5 % lowest
  superpixels of the tissue) to 1 (the 5 % highest), so that abundant genes do not outvote rare
  ones. With --smoothing-um, it is then smoothed within the tissue.
* The score of a label is the mean of its markers less the mean of all genes that have a map, as in
  scanpy's score_genes (negative weights: less what as many genes drawn at random would give). The
  label with the highest score wins.
* It must be higher than chance. Genes drawn at random, as many as the label has, with the same
  weights, have a score whose mean is 0 and whose variance and skewness follow from those of all
  genes at the same superpixel. A gamma distribution that has them (Pearson's type III) tells how
  often they stay below the winner's score; this to the power of the number of labels, how often the
  best of as many random sets does. That is the confidence, from 0 to 1. Where it is below 1 less
  --level, the superpixel is unclassified. So markers that mean nothing name about --level of the
  tissue, in the mean over many such tables, and --level 1 names all of it.

The confidence is against chance, not against the second best label: annotation-scores.npy tells how
near that is. A panel of genes that is mostly markers of one label makes this label hard to find,
since genes drawn at random are then often markers of it. marker_correlation in annotation.csv is
the mean correlation between the maps of a label's markers. It should be well above that of all
genes, which is printed too: if not, they do not mark the same places.

Labels may also be compared with those of others. --spot-labels is a table with the columns spot (or
any name, but the first) and label, such as labels.csv of prepare/legacy_st.py; or, as her2st has
it, with x, y (places on the array) and label. A spot has the annotation under most of its disc.
--truth compares with the regions of truth.npz, beside the same annotation of linearly interpolated
spots. Labels count as the same if their names are, but for capitals.

Files in: cnts-super/, mask.png and Histology_rgb.npy if they are there; locs.csv, radius.txt and
cnts.csv for the comparisons. Files out: annotation.npy, uint8 (rows, columns), 0 outside the
tissue, else the labels in the order of the table, the last one unclassified; annotation.csv (area
and colour of every label), annotation.png, annotation-scores.npy, float16 (labels, rows, columns),
annotation-scores.png, annotation-confidence.npy, float16 (rows, columns), and annotation.json;
annotation-spots.csv and annotation-truth.csv (spots, superpixels of every pair of labels).
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import pearson3

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import regions
from analysis.inputs import map_files, read_map, read_radius
from analysis.scores import rounded
from analysis.spots import disc_weights, interpolation_weights, superpixel_centres
from reading import tables

SCRIPT = "analysis/annotate.py"
UNCLASSIFIED = "unclassified"
LEVEL = 0.05  # share of the tissue that markers without meaning may name
LOW, HIGH = 0.05, 0.95  # quantiles of a map that become 0 and 1
MOST_LABELS = 254  # with unclassified, they are numbered in uint8
PANELS_ABREAST = 4  # of annotation-scores.png
BRIGHTEST = 99.5  # percentile of a score at which the colours end


class Marker(NamedTuple):
    gene: str
    label: str
    weight: float


# --------------------------------------------------------------------------------------------------
# tables
# --------------------------------------------------------------------------------------------------
def wrong(path: Path, problem: str, remedy: str) -> utils.StageError:
    return utils.StageError(f"{path} {problem}", remedy)


def read_rows(path: Path, remedy: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows of a small table (commas, tabs or semicolons), each with its line number.

    As R writes it, the header may lack the name of the first column.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(path, f"cannot be read as text: {error}.", remedy) from error
    delimiter = max(",\t;", key=lines[0].count) if lines else ","
    try:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        numbered = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise wrong(path, f"is not a table: line {reader.line_num}: {error}.", remedy) from error
    numbered = [(line, row) for line, row in numbered if any(row)]
    if len(numbered) < 2:
        raise wrong(path, "holds no row below its header.", remedy)
    (_, header), *rows = numbered
    if len(rows[0][1]) == len(header) + 1:
        header = ["", *header]
    for line, row in rows:
        if len(row) != len(header):
            raise wrong(
                path,
                f"has {len(row)} fields in line {line}; its header has {len(header)}.",
                remedy,
            )
    return header, rows


def read_markers(path: Path) -> list[Marker]:
    remedy = "Expected the columns gene and label, and perhaps weight, with a row per marker."
    header, rows = read_rows(path, remedy)
    if not {"gene", "label"} <= set(header):
        raise wrong(path, f"has the columns {utils.some(header)}.", remedy)
    markers, seen = [], {}
    for line, row in rows:
        cells = dict(zip(header, row, strict=True))
        weight = cells.get("weight", "1")
        if not (cells["gene"] and cells["label"]):
            raise wrong(path, f"lacks a gene or a label in line {line}.", remedy)
        if not utils.is_number(weight) or not 0 < abs(float(weight)) < np.inf:
            raise wrong(
                path, f"has the weight {weight!r} in line {line}; it must not be 0.", remedy
            )
        marker = Marker(cells["gene"], cells["label"], float(weight))
        if marker[:2] in seen:
            raise wrong(
                path,
                f"gives {marker.label} the gene {marker.gene} in lines {seen[marker[:2]]} and "
                f"{line}.",
                "Take one of them out.",
            )
        seen[marker[:2]] = line
        markers.append(marker)
    names = labels_of(markers)
    same = utils.duplicates(name.casefold() for name in [*names, UNCLASSIFIED])
    if same:
        raise wrong(
            path,
            f"has labels that differ in capitals alone, or are the name {UNCLASSIFIED!r}: "
            f"{utils.some(same)}.",
            "Name them otherwise.",
        )
    if len(names) > MOST_LABELS:
        raise wrong(
            path, f"has {len(names)} labels; expected {MOST_LABELS} at most.", "Use fewer labels."
        )
    check_markers(path, markers, names, "has")
    return markers


def labels_of(markers: list[Marker]) -> list[str]:
    """In the order of the table."""
    return list(dict.fromkeys(marker.label for marker in markers))


def check_markers(path: Path, markers: list[Marker], names: list[str], problem: str) -> None:
    """Every label needs a gene that marks its presence."""
    marked = {marker.label for marker in markers if marker.weight > 0}
    bare = [name for name in names if name not in marked]
    if bare:
        raise wrong(
            path,
            f"{problem} no gene that marks {utils.some(bare)} (with a weight above 0).",
            f"Add genes to these labels or take them out. Only genes with a map count: those of "
            f"{utils.GENE_NAMES.name}, which may be extended before {utils.HIGH_RESOLUTION} and "
            f"{utils.HISTEX} are run again.",
        )


def with_maps(
    stage: utils.Stage, path: Path, markers: list[Marker], genes: list[str]
) -> list[Marker]:
    """The markers that have a map, with a warning about the others."""
    there, names = set(genes), labels_of(markers)
    kept = [marker for marker in markers if marker.gene in there]
    absent = list(dict.fromkeys(m.gene for m in markers if m.gene not in there))
    if absent:
        n = len({marker.gene for marker in markers})
        text = f"{len(absent)} of {n} markers have no map and are left out: {', '.join(absent)}"
        spelling = {gene.casefold(): gene for gene in genes}
        meant = [f"{g} as {spelling[g.casefold()]}" for g in absent if g.casefold() in spelling]
        if meant:
            text += f". Written otherwise, there are {', '.join(meant)}"
        stage.warn(text)
    check_markers(path, kept, names, "has, among the genes with a map,")
    one = [name for name in names if sum(m.label == name for m in kept) == 1]
    if one:
        stage.warn(f"one marker alone seldom exceeds chance, as those of: {', '.join(one)}")
    return kept


def weight_table(markers: list[Marker], names: list[str], genes: list[str]) -> np.ndarray:
    """Weights (labels, genes), 0 for what is no marker."""
    row, column = pd.Index(names), pd.Index(genes)
    weights = np.zeros((len(names), len(genes)))
    for marker in markers:
        weights[row.get_loc(marker.label), column.get_loc(marker.gene)] = marker.weight
    return weights


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


def judge(sums: Sums, weights: np.ndarray) -> Annotation:
    """The winners, and how often the best of as many random sets of genes stays below them."""
    weights = weights[:, sums.used]
    n_labels, n = weights.shape
    mean = sums.total / n
    variance = (sums.squares / n - mean**2).clip(0)
    third = sums.cubes / n - 3 * mean * variance - mean**3
    best = np.zeros(len(mean), np.int64)
    highest, z, skewness = np.full(len(mean), -np.inf), np.zeros(len(mean)), np.zeros(len(mean))
    scores = sums.marked
    for label in range(n_labels):
        size = np.abs(weights[label]).sum()
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
    n = len(weights)
    one, two, three = ((weights**power).sum() for power in (1, 2, 3))
    second = two - (one**2 - two) / (n - 1)
    triples = one**3 - 3 * one * two + 2 * three
    third = three - 3 * (one * two - three) / (n - 1) + 2 * triples / ((n - 1) * max(n - 2, 1))
    return float(second), float(third)


def marker_correlations(sums: Sums, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean correlation between the markers of each label (labels,), and between all genes.

    It is weighted by their standard deviations; NaN for a single marker. Before ``judge``.
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
    return judge(add_up(images, weights, tissue, sigma_um), weights)


def as_labels(found: Annotation, tissue: np.ndarray, level: float) -> np.ndarray:
    """uint8 (rows, columns): 0 outside the tissue, the label from 1, the last one unclassified."""
    labels = np.zeros(tissue.shape, np.uint8)
    none = len(found.scores) + 1
    labels[tissue] = np.where(found.confidence >= 1 - level, found.best + 1, none)
    return labels


# --------------------------------------------------------------------------------------------------
# comparisons
# --------------------------------------------------------------------------------------------------
def read_spot_labels(path: Path, spots: pd.Index) -> tuple[pd.Series, int]:
    """Labels by spot id, those of ``spots`` alone; how many rows are of other spots."""
    remedy = "Expected the columns spot and label, or x, y and label as her2st has them."
    header, rows = read_rows(path, remedy)
    if "label" not in header:
        raise wrong(path, f"has the columns {utils.some(header)}; label is missing.", remedy)
    table = pd.DataFrame([row for _, row in rows], columns=header, dtype=str)
    ids = table.iloc[:, 0]
    if not ids.isin(spots).any() and {"x", "y"} <= set(header):
        try:
            x, y = (table[name].astype(float) for name in ("x", "y"))
        except ValueError as error:
            raise wrong(path, f"has a place that is no number: {error}.", remedy) from error
        ids = pd.Series([f"{a:.0f}x{b:.0f}" for a, b in zip(x, y, strict=True)])
    labels = pd.Series(table["label"].to_numpy(), index=ids)
    labels = labels[labels != ""]
    here = labels[labels.index.isin(spots)]
    if repeated := utils.duplicates(here.index):
        raise wrong(path, f"labels the spots {utils.some(repeated)} more than once.", remedy)
    if here.empty:
        raise wrong(
            path,
            f"labels the spots {utils.some(labels.index)}; {utils.LOCS.name} has "
            f"{utils.some(spots)}.",
            "Give the labels of this section.",
        )
    return here, len(labels) - len(here)


def agreement(given: np.ndarray, found: np.ndarray, names: list[str]) -> dict:
    """How far labels ``found`` (n,), numbers of ``names`` from 1, agree with the names ``given``.

    ARI is over all; what is unclassified is a label of its own there. Accuracy is over those whose
    given name is among the labels, and counts the unclassified as wrong.
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
            "balanced accuracy": rounded(np.mean(of_each)),
        }
    return facts


def contingency(given: np.ndarray, found: np.ndarray, names: list[str]) -> pd.DataFrame:
    """A row per name given, a column per label: how often the two meet."""
    found = pd.Categorical.from_codes(found - 1, [*names, UNCLASSIFIED])
    table = pd.crosstab(pd.Series(given, name="given"), found, dropna=False)
    return table.rename_axis(columns=None).reset_index()


def compare_spots(
    stage: utils.Stage, labels: np.ndarray, names: list[str]
) -> tuple[dict, pd.DataFrame]:
    """Agreement with --spot-labels, and the table of pairs."""
    path = stage.args.spot_labels
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    given, others = read_spot_labels(path, locs.index)
    stage.inputs[path.name] = utils.fingerprint(path)
    if others:
        stage.warn(f"{path.name}: {others} labels are of spots that are not in {utils.LOCS.name}")
    centres = locs.loc[given.index, ["y", "x"]].to_numpy() / utils.TOKEN_PX
    discs = disc_weights(centres, read_radius(stage.directory), labels.shape)
    found, _ = regions.spot_labels(labels, discs)
    on = found > 0
    if not on.any():
        raise wrong(path, "labels no spot on the tissue.", "Give the labels of this section.")
    given = given.to_numpy(str)
    facts = {
        "labelled spots on the tissue": int(on.sum()),
        **agreement(given[on], found[on], names),
    }
    return facts, contingency(given[on], found[on], names)


def interpolated_maps(stage: utils.Stage, genes: list[str], tissue: np.ndarray):
    """Counts of the spots, interpolated linearly: a generator of images, one per gene."""
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    counts, measured = tables.read_sparse_counts(stage, stage.path(utils.CNTS), locs.index)
    column = regions.columns_of(stage, measured, genes)
    centres = locs[["y", "x"]].to_numpy() / utils.TOKEN_PX
    _, linear = interpolation_weights(centres, superpixel_centres(tissue.shape))
    counts = counts.tocsc()
    for i in column:
        image = (linear @ counts[:, [i]].toarray()).reshape(tissue.shape)
        yield image.clip(0)  # rounding can make it negative


def compare_truth(
    stage: utils.Stage, tissue: np.ndarray, labels: dict[str, np.ndarray], names: list[str]
) -> tuple[dict, pd.DataFrame]:
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
    facts, tables = {}, []
    for method, image in labels.items():
        facts[method] = agreement(given, image[scored].astype(int), names)
        tables.append(contingency(given, image[scored].astype(int), names))
        tables[-1].insert(0, "method", method)
    return facts, pd.concat(tables, ignore_index=True)


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def on_grid(values: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """float16 (..., rows, columns) of values (..., superpixels), NaN outside the tissue."""
    image = np.full((*values.shape[:-1], *tissue.shape), np.nan, np.float16)
    image[..., tissue] = values
    return image


def describe(
    labels: np.ndarray, names: list[str], counts: np.ndarray, together: np.ndarray, confidence
) -> pd.DataFrame:
    """annotation.csv: a row per label, in order, unclassified last."""
    n = len(names) + 1
    number = np.arange(1, n + 1)
    size = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    sure = np.bincount(labels[labels > 0], confidence, n + 1)[1:]
    return pd.DataFrame(
        {
            "label": number,
            "name": [*names, UNCLASSIFIED],
            "markers": np.append(counts, 0),
            "marker_correlation": np.append(together, np.nan),
            "superpixels": size,
            "mm2": size * regions.SUPERPIXEL_MM2,
            "share_of_tissue": size / size.sum(),
            "mean_confidence": np.where(size > 0, sure / np.maximum(size, 1), np.nan),
            "colour": regions.label_colours(n, grey=n),
        }
    )


def report(table: pd.DataFrame, facts: dict) -> str:
    width = max(len(name) for name in table["name"]) + 2
    lines = [f"{'label':<{width}}{'mm2':>8}{'share':>8}{'markers':>9}  their mean correlation"]
    for row in table.itertuples():
        together = "" if np.isnan(row.marker_correlation) else f"{row.marker_correlation:.2f}"
        markers = row.markers or ""
        lines.append(
            f"{row.name:<{width}}{row.mm2:>8.3f}{row.share_of_tissue:>8.1%}{markers:>9}  {together}"
        )
    lines.append(f"mean correlation of all {facts['genes']} genes: {facts['correlation']:.2f}")
    if "spots" in facts:
        lines.append(f"labels of spots: {in_words(facts['spots'])}")
    lines += [f"truth, {way}: {in_words(found)}" for way, found in facts.get("truth", {}).items()]
    return "\n".join(lines)


def in_words(found: dict) -> str:
    ari = "unknown" if found["ARI"] is None else f"{found['ARI']:.3f}"
    text = f"ARI {ari} over {found['n']:,}"
    if not found["of the labels"]:
        return f"{text}; no name is the same"
    sure = found["accuracy of the classified"]
    return (
        f"{text}; of {found['of the labels']:,} with a name of a label, right "
        f"{found['accuracy']:.1%} (of the classified {'none' if sure is None else f'{sure:.1%}'}, "
        f"mean of the labels {found['balanced accuracy']:.1%}), unclassified "
        f"{found['unclassified']:.1%}"
    )


def draw_scores(scores: np.ndarray, names: list[str], markers: list[list[str]]):
    """A map per label: 0 is what genes drawn at random have; each has colours of its own."""
    from matplotlib.figure import Figure

    across = min(PANELS_ABREAST, len(names))
    down = -(-len(names) // across)
    rows, columns = scores.shape[1:]
    height = 3.4 * rows / columns + 0.75  # inches
    figure = Figure(figsize=(3.9 * across, height * down + 0.2), layout="constrained", dpi=110)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, name, image, genes in zip(
        axes, names, scores.astype(np.float32), markers, strict=False
    ):
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


def share(text: str) -> float:
    """argparse type: a number above 0, and 1 at most."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and 1 at most")
    return number


def build_parser() -> argparse.ArgumentParser:
    parser = regions.parser_of(__doc__)
    option = parser.add_argument
    option("--markers", type=Path, required=True, help="Table of gene, label and perhaps weight.")
    option(
        "--level",
        type=share,
        default=LEVEL,
        help=f"Share of the tissue that markers without meaning may name; without it, {LEVEL}. "
        f"1 leaves nothing unclassified.",
    )
    option(
        "--smoothing-um",
        type=regions.not_below_zero,
        default=0.0,
        help="Sigma of a Gaussian in um by which maps are smoothed; without it, 0, which is none.",
    )
    option("--spot-labels", type=Path, help="Table of labels of spots to compare with.")
    option("--truth", action="store_true", help="Compare with the regions of truth.npz.")
    return parser


def check_inputs(stage: utils.Stage) -> None:
    args = stage.args
    regions.check_output(stage)
    stage.require(utils.MAPS)
    if args.spot_labels or args.truth:
        stage.require(utils.LOCS)
    if args.spot_labels:
        stage.require(utils.RADIUS)
    if args.truth:
        stage.require(utils.CNTS)


def run_annotation(stage: utils.Stage) -> None:
    args = stage.args
    check_inputs(stage)
    files = map_files(stage.directory)
    genes = list(files)
    markers = with_maps(stage, args.markers, read_markers(args.markers), genes)
    stage.inputs[args.markers.name] = utils.fingerprint(args.markers)
    names = labels_of(markers)
    weights = weight_table(markers, names, genes)
    tissue = regions.tissue_of(stage, np.isfinite(read_map(next(iter(files.values())))))
    print(f"{tissue.sum():,} superpixels of tissue, {len(genes)} genes, {len(names)} labels")

    images = (regions.read_checked(stage, path, tissue) for path in files.values())
    sums = add_up(images, weights, tissue, args.smoothing_um)
    check_genes(stage, markers, names, genes, sums.used)
    weights = np.where(sums.used, weights, 0)
    together, overall = marker_correlations(sums, weights)
    found = judge(sums, weights)
    del sums
    labels = as_labels(found, tissue, args.level)
    table = describe(labels, names, (weights != 0).sum(1), together, found.confidence)
    facts = {
        "labels": len(names),
        "genes": len(genes),
        "markers": int((weights != 0).any(0).sum()),
        "level": args.level,
        "smoothing um": args.smoothing_um,
        "tissue mm2": rounded(tissue.sum() * regions.SUPERPIXEL_MM2),
        "unclassified": rounded(table["share_of_tissue"].iloc[-1]),
        "median confidence": rounded(np.median(found.confidence)),
        "correlation": rounded(overall),
    }
    tables = {"annotation.csv": table}
    if args.spot_labels:
        facts["spots"], tables["annotation-spots.csv"] = compare_spots(stage, labels, names)
    if args.truth:
        plain = annotate(
            interpolated_maps(stage, genes, tissue), weights, tissue, args.smoothing_um
        )
        methods = {"maps": labels, "interpolated spots": as_labels(plain, tissue, args.level)}
        facts["truth"], tables["annotation-truth.csv"] = compare_truth(
            stage, tissue, methods, names
        )
    print(report(table, facts))
    arrays = {
        "annotation": labels,
        "annotation-confidence": on_grid(found.confidence, tissue),
        "annotation-scores": on_grid(found.scores, tissue),
    }
    figures = {}
    if not args.no_plot:
        own = [[m.gene for m in markers if m.label == name] for name in names]
        figures["annotation-scores"] = draw_scores(arrays["annotation-scores"], names, own)
        figures["annotation"] = regions.draw_labels(
            labels,
            table["name"].tolist(),
            f"{len(names)} labels by marker genes",
            regions.read_colours(stage, tissue.shape),
            (
                arrays["annotation-confidence"].astype(np.float32),
                f"confidence; below {1 - args.level:g}, unclassified",
            ),
            grey=len(names) + 1,
        )
    regions.write(stage, "annotation", facts, arrays, tables, figures)


def check_genes(
    stage: utils.Stage, markers: list[Marker], names: list[str], genes: list[str], used: np.ndarray
) -> None:
    """Enough genes must vary over the tissue: those of a label, and others to compare with."""
    varying = {gene for gene, varies in zip(genes, used, strict=True) if varies}
    kept = [marker for marker in markers if marker.gene in varying]
    constant = sorted({marker.gene for marker in markers} - varying)
    if constant:
        stage.warn(f"left out, since their maps are the same everywhere: {', '.join(constant)}")
    check_markers(stage.args.markers, kept, names, "has, among the genes whose map varies,")
    for name in names:
        own = {marker.gene for marker in kept if marker.label == name}
        if own == varying:
            raise wrong(
                stage.args.markers,
                f"gives {name} all {len(own)} genes whose map varies: there is no other gene to "
                f"compare with.",
                "Give the label fewer genes, or make maps of more.",
            )


def main(argv: list[str] | None = None) -> int:
    return utils.run_stage(run_annotation, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
