"""Test which gene sets are enriched among the genes of regions, and among those with a pattern.

    python analysis/enrich.py --directory data/section --gene-sets h.all.v2024.1.Hs.symbols.gmt

Reads   the GMT file --gene-sets; segment-markers.csv of segment.py, patterns.csv of patterns.py, or
        both (from --tables, if they are not in the folder of the sample); locs.csv and cnts.csv.

Writes  enrichment.csv  a row per gene set and list of genes
        enrichment.png  the best sets of every list
        venn.png        genes found by spots and by maps, and the sets enriched among them
        enrich.json     the record

The lists of genes are

* region 1, 2, ...: genes that are ``higher`` in this region (segment.py explains it), with q below
  --max-q and a log2 fold change above --log2-fold. They are ranked by the lower of their two AUC.
  The background is every gene of cnts.csv that has a count.
* spots: genes whose measured counts have a pattern (found_by_spots), ranked by Moran's I.
* maps: genes whose map has a pattern (found_by_maps), ranked by their correlation with held-out
  spots. Only genes with a map could be in this list and the one before. So these genes are their
  background: that they were chosen for prediction is not a finding. With --background measured, the
  background is every gene that has a count.

--gene-sets is a GMT file as MSigDB, Enrichr and Reactome offer it: a set per line, its name, a
description and its genes, with tabs between them. Nothing is downloaded. Gene names must match
exactly. A gene outside the background does not count, nor does it add to the size of a set. Sets
smaller than --min-size or larger than --max-size are left out. Two tests are made:

* p: over-representation of the set in the list, one-sided, by the hypergeometric distribution
  (Fisher's exact test). ratio is the number found divided by the number expected.
* rank_p: compares the ranks of all genes of the background, one-sided, by the Mann-Whitney test; so
  it needs no threshold. rank_auc is the probability that a gene of the set has a higher rank than
  another gene; 0.5 is chance. Genes of a set vary together, which makes the plain test find too
  much. So the variance is that for a correlation of 0.01, as in cameraPR of limma.

q and rank_q are corrected for all sets tested on the same list (Benjamini and Hochberg). They are
about genes, not about tissue: they do not say that the genes of a set also vary together in another
section.

The tests are a few lines of scipy. gseapy 1.3.1 and decoupler 2.2.0 also work without the internet,
but pandas 3.1 warns of what they call; they install 4 and 18 more packages, and decoupler compiles
for a minute or two at the first use. The p of gseapy is the same. Its q is lower, sometimes by
half, because it does not count sets that have no gene in the list.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import files
from reading import cli

SCRIPT = "analysis/enrich.py"
MAX_Q = 0.05
LOG2_FOLD = 0.5  # a region's genes have 1.4 times the counts of elsewhere, at least
MIN_SIZE, MAX_SIZE = 5, 500  # genes of a set, in the background; usual limits


def build_parser() -> cli.Parser:
    parser = cli.stage_parser(__doc__)
    files.add_output(parser)
    option = parser.add_argument
    option("--gene-sets", type=Path, required=True, help="Gene sets, a GMT file.")
    tables_help = (
        f"Folder of {files.SEGMENT_MARKERS.name} and {files.PATTERN_TABLE.name} (default: the "
        "folder of the sample)."
    )
    option("--tables", metavar="FOLDER", type=Path, help=tables_help)
    q_help = "A gene or gene set counts as found if its q (false discovery rate) is below this."
    option("--max-q", type=cli.from_0, default=MAX_Q, help=q_help)
    parser.alias("--level", "--max-q")
    fold_help = "Genes of a region must have a log2 fold change above this."
    option("--log2-fold", type=cli.from_0, default=LOG2_FOLD, help=fold_help)
    background_help = (
        "What genes with a pattern are compared with: all genes with a map, or all with a count."
    )
    option("--background", choices=["maps", "measured"], default="maps", help=background_help)
    sizes = (("--min-size", "fewer", MIN_SIZE), ("--max-size", "more", MAX_SIZE))
    for name, word, size in sizes:
        size_help = f"Do not test sets with {word} genes in the background than this."
        option(name, type=cli.positive, default=size, help=size_help)
    return parser


if __name__ == "__main__":
    cli.start(build_parser(), SCRIPT)  # what needs none of the slow imports below

from collections.abc import Collection
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq
from scipy.sparse import csr_array

from analysis import regions, sheets
from analysis.inputs import anew

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

LARGEST = 1e15  # of what the tables hold
CORRELATION = 0.01  # between the genes of a set, as in limma's cameraPR
MARKERS, PATTERNS = files.SEGMENT_MARKERS, files.PATTERN_TABLE
OLD_MARKERS = "markers.csv"  # what segment.py wrote before; a table that users write themselves
NUMBERS = {  # columns of each table, beside gene
    MARKERS: ["region", "log2_fold", "auc", "auc_counts", "q"],
    PATTERNS: ["spots_I", "held_out_r"],
}
FLAGS = {MARKERS: ["higher"], PATTERNS: ["found_by_spots", "found_by_maps"]}  # True and False
BY_SPOTS, BY_MAPS = "spots", "maps"
TOP, MOST_ROWS = 4, 40  # sets of a list, and of all, in the picture
TINY_Q = 1e-300  # a smaller q has the colour of this one
LONGEST_NAME = 48  # characters of a set's name in the picture
COLOURS = {  # of circle and text, which the colour-blind tell apart
    BY_SPOTS: ("#4c78a8", "#2f5680"),
    BY_MAPS: ("#e6a532", "#8a5a00"),
}


Panel = tuple[str, set[str], set[str]]  # title, found by spots, found by maps


class GeneList(NamedTuple):
    """Genes found, and the ranking of all that could be found: the index of ``statistic``."""

    source: str
    name: str
    found: pd.Series  # bool by gene
    statistic: pd.Series  # by gene, the higher the better


# --------------------------------------------------------------------------------------------------
# gene sets
# --------------------------------------------------------------------------------------------------
def read_gmt(path: Path) -> dict[str, list[str]]:
    """Name -> genes, each once."""
    remedy = "Expected a set a line: its name, a description and its genes, with tabs between them."

    def wrong(problem: str) -> utils.StageError:
        return utils.StageError(f"{path} {problem}", remedy)

    lines = sheets.read_lines(path, wrong)
    sets: dict[str, list[str]] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *rest = (field.strip() for field in line.split("\t"))
        genes = list(dict.fromkeys(gene for gene in rest[1:] if gene))
        if not rest:
            raise wrong(f"has no tab in line {number}: {line.strip()[:40]!r}.")
        if not name:
            raise wrong(f"names no set in line {number}.")
        if not genes:
            raise wrong(f"has no gene in line {number}, set {name}.")
        if name in sets:
            raise wrong(f"has the set {name} in lines {line_of[name]} and {number}.")
        sets[name], line_of[name] = genes, number
    if not sets:
        raise wrong("holds no set.")
    return sets


def membership(
    sets: dict[str, list[str]], genes: pd.Index, smallest: int, largest: int
) -> tuple[list[str], csr_array]:
    """Names of the sets of the right size, and ones (sets, genes) for their genes."""
    at = {name: genes.get_indexer(pd.Index(members)) for name, members in sets.items()}
    at = {name: np.sort(columns[columns >= 0]) for name, columns in at.items()}
    at = {name: columns for name, columns in at.items() if smallest <= len(columns) <= largest}
    ends = np.cumsum([0, *map(len, at.values())])
    columns = np.concatenate([np.empty(0, np.int64), *at.values()])
    return list(at), csr_array((np.ones(len(columns)), columns, ends), (len(at), len(genes)))


# --------------------------------------------------------------------------------------------------
# tests
# --------------------------------------------------------------------------------------------------
def over_representation(member: csr_array, found: np.ndarray) -> tuple[np.ndarray, ...]:
    """Genes of each set (sets,) that are ``found`` (genes,), those expected, one-sided p."""
    size, hits = member.sum(axis=1), member @ found.astype(float)
    n, drawn = len(found), int(found.sum())
    return hits, size * drawn / n, stats.hypergeom.sf(hits - 1, n, size, drawn)


def rank_test(
    member: csr_array, statistic: np.ndarray, correlation: float = CORRELATION
) -> tuple[np.ndarray, np.ndarray]:
    """AUC (sets,) and one-sided p that a set's genes have higher ``statistic`` (genes,).

    Mann-Whitney with the normal distribution, corrected for ties and continuity. Genes of a set
    are correlated, which widens the distribution of U (Barry, Nobel and Wright 2008, as in limma's
    rankSumTestWithCorrelation).
    """
    ranks, n = stats.rankdata(statistic), len(statistic)
    size = member.sum(axis=1)
    others = n - size
    u = member @ ranks - size * (size + 1) / 2
    pairs = size * others
    # P(two normal differences are both positive) = 1/4 + asin(their correlation) / (2 pi)
    angles = np.arcsin(1) + np.arcsin(0.5) * (others - 1)
    angles += np.arcsin(correlation / 2) * (size - 1) * (others - 1)
    angles += np.arcsin((1 + correlation) / 2) * (size - 1)
    variance = pairs / (2 * np.pi) * angles * stats.tiecorrect(ranks)
    some = variance > 0  # else all genes are the same, or in the set
    z = np.divide(u - pairs / 2 - 0.5, np.sqrt(variance), out=np.full(len(u), -np.inf), where=some)
    return np.divide(u, pairs, out=np.full(len(u), 0.5), where=pairs > 0), stats.norm.sf(z)


def examine(
    genes: GeneList, sets: dict[str, list[str]], smallest: int, largest: int
) -> pd.DataFrame:
    """A row per set of the right size, the most over-represented first."""
    ranked = genes.statistic.sort_values(ascending=False, kind="stable").index
    found = genes.found.reindex(ranked).to_numpy(bool)
    names, member = membership(sets, ranked, smallest, largest)
    hits, expected, p = over_representation(member, found)
    auc, rank_p = rank_test(member, genes.statistic.reindex(ranked).to_numpy(float))
    columns = [member.indices[a:b] for a, b in pairwise(member.indptr)]  # the best rank first
    table = pd.DataFrame(
        {
            "source": genes.source,
            "list": genes.name,
            "set": names,
            "size": member.sum(axis=1).astype(int),
            "found": hits.astype(int),
            "expected": expected,
            "ratio": hits / np.where(expected > 0, expected, np.nan),
            "p": p,
            "q": stats.false_discovery_control(p),
            "rank_auc": auc,
            "rank_p": rank_p,
            "rank_q": stats.false_discovery_control(rank_p),
            "genes": [";".join(ranked[of_set[found[of_set]]]) for of_set in columns],
        }
    )
    return table.sort_values(["p", "rank_p", "set"], kind="stable", ignore_index=True)


# --------------------------------------------------------------------------------------------------
# lists of genes
# --------------------------------------------------------------------------------------------------
def read_findings(
    stage: utils.Stage, artifact: utils.Artifact, measured: pd.Index
) -> pd.DataFrame | None:
    """segment-markers.csv or patterns.csv; None if it is not there."""
    folder = stage.args.tables or stage.directory
    path, script = folder / artifact.name, str(artifact.made_by)
    again = f"Run: {stage.command(script)}"
    if not path.is_file():
        if artifact is MARKERS:
            refuse_old_markers(folder / OLD_MARKERS, f"{again} --force")
        stage.use(path)  # that there is none
        print(f"without {path.name}: run {script} to have its genes as well")
        return None
    stage.require(artifact, folder=folder)
    again = anew(stage, script)
    numbers, flags = NUMBERS[artifact], FLAGS[artifact]
    key = ["region", "gene"] if artifact is MARKERS else ["gene"]
    columns = list(dict.fromkeys([*key, *numbers, *flags]))

    def refuse(problem: str) -> utils.StageError:
        return utils.StageError(f"{path} is not a table of {', '.join(columns)}: {problem}", again)

    table = sheets.read_sheet(path, columns, refuse)[columns]
    rows = table[key].agg(" ".join, axis=1)
    for column in numbers:
        table[column] = sheets.numbers_in(table, column, refuse, LARGEST)
    for flag in flags:
        truth = table[flag].str.lower().map({"true": True, "false": False})
        if truth.isna().any():
            raise refuse(f"{flag} is not True or False.")
        table[flag] = truth.astype(bool)
    if artifact is MARKERS and table["region"].isna().any():
        raise refuse("a row has no region.")
    if table.empty:  # too few spots to test any gene: to run the script again would not help
        print(f"{path.name} holds no gene, so there are none of {script}")
        return None
    if unknown := [gene for gene in table["gene"] if gene not in measured]:
        problem = f"has genes that {stage.path(utils.CNTS).name} lacks: {utils.some(unknown)}."
        raise utils.StageError(f"{path} {problem}", again)
    if repeated := utils.duplicates(rows):
        raise utils.StageError(f"{path} has {utils.some(repeated)} more than once.", again)
    return table


def refuse_old_markers(path: Path, again: str) -> None:
    """segment.py once wrote the name under which users keep their own marker genes."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        header = file.readline().strip().split(",")
    if {"region", "gene", "log2_fold", "auc"} <= {*header}:
        raise utils.StageError(
            f"{path} was written by an earlier {MARKERS.made_by}, which now writes {MARKERS.name}; "
            f"only that is read.",
            f"{again} (or move {path.name} away to go on without its genes).",
        )


def region_lists(
    markers: pd.DataFrame, measured: pd.Index, max_q: float, fold: float
) -> list[GeneList]:
    """A list per region; genes of the background that were not tested have the lowest rank."""
    lists = []
    for region, table in markers.groupby("region"):
        table = table.set_index("gene").reindex(measured)
        found = (table["q"] < max_q) & (table["log2_fold"] > fold) & table["higher"].eq(True)
        lowest = table[["auc", "auc_counts"]].min(axis=1, skipna=False).fillna(0)
        lists.append(GeneList("markers", f"region {region:g}", found, lowest))
    return lists


def pattern_lists(patterns: pd.DataFrame, background: pd.Index) -> list[GeneList]:
    """Genes that the maps lack are not found, and have the lowest rank."""
    table = patterns.set_index("gene").reindex(background)
    columns = {BY_SPOTS: ("found_by_spots", "spots_I"), BY_MAPS: ("found_by_maps", "held_out_r")}
    return [
        GeneList("patterns", name, table[flag].eq(True), table[statistic].fillna(-1))
        for name, (flag, statistic) in columns.items()
    ]


def read_lists(stage: utils.Stage) -> list[GeneList]:
    args = stage.args
    stage.require(utils.LOCS, utils.CNTS)
    spots = regions.read_measured_spots(stage)
    markers, patterns = (read_findings(stage, table, spots.genes) for table in (MARKERS, PATTERNS))
    if markers is None and patterns is None:
        folder = args.tables or stage.directory
        missing = [t for t in (MARKERS, PATTERNS) if not (folder / t.name).is_file()]
        remedy = f"Run: {' and '.join(stage.command(table.made_by) for table in missing)}"
        raise utils.StageError(
            f"Neither {MARKERS.name} nor {PATTERNS.name} in {folder} names any gene, or they are "
            f"missing.",
            remedy if missing else f"There were too few spots to test. {regions.MORE_SPOTS}",
        )
    counted = spots.genes[np.asarray(spots.counts.sum(axis=0)).ravel() > 0]
    lists = []
    if markers is not None:
        lists += region_lists(markers, counted, args.max_q, args.log2_fold)
    if patterns is not None:
        of_maps = pd.Index(patterns["gene"])
        both = args.background == "measured"
        lists += pattern_lists(patterns, of_maps.union(counted, sort=False) if both else of_maps)
    return lists


# --------------------------------------------------------------------------------------------------
# pictures
# --------------------------------------------------------------------------------------------------
def overlap_area(distance: float, a: float, b: float) -> float:
    """Area that two circles of radii a and b share."""
    if distance >= a + b:
        return 0.0
    if distance <= abs(a - b):
        return np.pi * min(a, b) ** 2
    corner_a = np.arccos((distance**2 + a**2 - b**2) / (2 * distance * a))
    corner_b = np.arccos((distance**2 + b**2 - a**2) / (2 * distance * b))
    kite = (a + b - distance) * (distance + a - b) * (distance - a + b) * (distance + a + b)
    return float(a**2 * corner_a + b**2 * corner_b - np.sqrt(max(kite, 0)) / 2)


def place_circles(first: int, second: int, both: int) -> tuple[float, float, float]:
    """Two radii and a distance: circles and overlap have areas of these numbers."""
    a, b = np.sqrt(first / np.pi), np.sqrt(second / np.pi)
    if both == 0:
        return a, b, (a + b) * 1.05
    if both == min(first, second):
        return a, b, abs(a - b)
    return a, b, brentq(lambda d: overlap_area(d, a, b) - both, abs(a - b), a + b)


def draw_venn(panels: Collection[Panel]) -> Figure:
    """Two circles a panel: what spots find, what maps find."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, spots, maps) in zip(axes, panels, strict=True):
        regions.bare(ax, title)
        if spots | maps:
            draw_circles(ax, *count_parts(spots, maps).values())
        else:
            ax.text(0.5, 0.5, "none", ha="center", va="center", transform=ax.transAxes)
    return figure


def draw_circles(ax: Axes, only_spots: int, both: int, only_maps: int) -> None:
    """A count stands in its part, or beside it where the part is thin."""
    from matplotlib.patches import Circle

    a, b, distance = place_circles(only_spots + both, only_maps + both, both)
    widest, left, right = max(a, b), min(-a, distance - b), max(a, distance + b)
    center, reach = (left + right) / 2, max(right - left, 3 * widest)
    circles = ((0, a, BY_SPOTS, only_spots + both), (distance, b, BY_MAPS, only_maps + both))
    for x, radius, name, n in circles:
        fill, ink = COLOURS[name]
        if radius:
            ax.add_patch(Circle((x, 0), radius, facecolor=fill, alpha=0.45, lw=0))
            ax.add_patch(Circle((x, 0), radius, fill=False, ec=fill, lw=2))
        at, text = center + (-0.27 if name == BY_SPOTS else 0.27) * reach, f"by {name}: {n}"
        ax.text(at, 1.1 * widest, text, color=ink, ha="center", va="bottom", fontsize=11)
    beside = 0.12 * widest
    parts = (  # where a part lies on the line through both centres, and where there is room beside
        (only_spots, -a, min(a, distance - b), left - beside, "right"),
        (both, max(-a, distance - b), min(a, distance + b), 0, ""),
        (only_maps, max(a, distance - b), distance + b, right + beside, "left"),
    )
    for n, low, high, outside, align in parts:
        fits = not align or high - low > 0.35 * widest
        at = (low + high) / 2 if fits else outside
        if n:
            ax.text(at, 0, str(n), ha="center" if fits else align, va="center", fontsize=13)
    ax.set(xlim=(center - 0.6 * reach, center + 0.6 * reach), aspect="equal")
    ax.set_ylim(-1.1 * widest, 1.4 * widest)


def best_sets(table: pd.DataFrame, names: list[str]) -> list[str]:
    """The best sets of every list, those of the first list first; fewer of each if too many."""
    best = []
    for top in range(TOP, 0, -1):
        parts = [table.loc[table["list"] == name, "set"].head(top) for name in names]
        best = list(dict.fromkeys(pd.concat(parts)))
        if len(best) <= MOST_ROWS:
            break
    return best[:MOST_ROWS]


def draw_dots(table: pd.DataFrame, names: list[str], max_q: float) -> Figure:
    """Sets by lists: a dot's size is the share of the set that is found, its colour is q."""
    from matplotlib.figure import Figure

    found, sure = table[table["found"] > 0], table[table["q"] < max_q]
    shown = best_sets(sure if len(sure) else found, names)
    found, sure = (part[part["set"].isin(shown)] for part in (found, sure))
    column, row = ({name: i for i, name in enumerate(group)} for group in (names, shown))
    height = 0.27 * max(len(shown), 5) + 2.0  # inches
    figure = Figure(figsize=(0.55 * len(names) + 7.0, height), layout="constrained", dpi=110)
    ax = figure.subplots()

    def dots(part: pd.DataFrame, **style: Any) -> PathCollection:
        size = dot_size((part["found"] / part["size"]).to_numpy(float))
        return ax.scatter(part["list"].map(column), part["set"].map(row), s=size, **style)

    dots(found, color="0.92", edgecolors="0.75", linewidths=0.6)
    strength = -np.log10(sure["q"].clip(lower=TINY_Q))
    low = -np.log10(max(max_q, TINY_Q))
    top = max(float(strength.max()), low + 1) if len(sure) else low + 1
    drawn = dots(sure, c=strength, cmap="viridis_r", vmin=low, vmax=top, edgecolors="black")
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_yticks(range(len(shown)), [shortened(name) for name in shown], fontsize=8)
    ax.set(xlim=(-0.6, len(names) - 0.4), ylim=(max(len(shown), 1) - 0.4, -0.6))
    ax.grid(color="0.93")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    title = "best gene sets of every list" if len(sure) else "no gene set is enriched"
    ax.set_title(f"{title}; grey: q of {max_q:g} and more", fontsize=10)
    if len(sure):
        figure.colorbar(drawn, ax=ax, label="$-\\log_{10}$ q", shrink=0.7, aspect=15)
    shares = np.array([0.25, 0.5, 1.0])
    for share, size in zip(shares, dot_size(shares), strict=True):
        ax.scatter([], [], s=size, color="0.6", label=f"{share:.0%}")
    figure.legend(
        title="of the set\nis found", loc="outside right upper", frameon=False, fontsize=8,
        labelspacing=1.2,
    )  # fmt: skip
    return figure


def dot_size(share: np.ndarray) -> np.ndarray:
    return 15 + 200 * share


def shortened(name: str) -> str:
    name = name.replace("_", " ")
    name = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
    return regions.plain(name)


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def summarise(lists: list[GeneList], table: pd.DataFrame, max_q: float) -> dict[str, Any]:
    """Numbers of genes and sets of every list."""
    found = {}
    for genes in lists:
        part = table[table["list"] == genes.name]
        found[genes.name] = {
            "genes": int(genes.found.sum()),
            "background": len(genes.found),
            "sets tested": len(part),
            "enriched": int((part["q"] < max_q).sum()),
            "enriched by ranks": int((part["rank_q"] < max_q).sum()),
        }
    return found


def compare_findings(lists: list[GeneList], table: pd.DataFrame, max_q: float) -> dict[str, Panel]:
    """Panels of venn.png: genes and sets by spots and by maps; none without patterns."""
    by = {genes.name: genes.found for genes in lists if genes.source == "patterns"}
    if not by:
        return {}
    genes = {name: {*found.index[found]} for name, found in by.items()}
    sure = table[table["q"] < max_q]
    sets = {name: {*sure["set"][sure["list"] == name]} for name in by}
    title = f"genes with a pattern, of {len(by[BY_SPOTS])}"
    return {
        "genes": (title, genes[BY_SPOTS], genes[BY_MAPS]),
        "sets": (f"gene sets enriched among them (q < {max_q:g})", sets[BY_SPOTS], sets[BY_MAPS]),
    }


def count_parts(spots: set[str], maps: set[str]) -> dict[str, int]:
    """Sizes of the parts of a Venn diagram, from left to right."""
    return {
        "spots only": len(spots - maps),
        "both": len(spots & maps),
        "maps only": len(maps - spots),
    }


def dropped_sets(
    sets: dict[str, list[str]], lists: list[GeneList], table: pd.DataFrame, limits: tuple[int, int]
) -> dict[str, list[str]]:
    """Why sets were tested on no list -> their names; a set is as large as in its largest list."""
    tested = {*table["set"]}
    backgrounds = [{*genes.found.index} for genes in lists]
    reasons: dict[str, list[str]] = {}
    for name, genes in sets.items():
        if name in tested:
            continue
        size = max(len(background.intersection(genes)) for background in backgrounds)
        if size == 0:
            why = "no gene that was measured"
        elif size < limits[0]:
            why = f"fewer than {limits[0]} measured genes (--min-size)"
        else:
            why = f"more than {limits[1]} measured genes (--max-size)"
        reasons.setdefault(why, []).append(name)
    return reasons


def check_sets(
    stage: utils.Stage, sets: dict[str, list[str]], lists: list[GeneList], table: pd.DataFrame
) -> None:
    """Some set must be left to test; the reason is mostly another way to write gene names."""
    if not table.empty:
        return
    args = stage.args
    measured = {gene for genes in lists for gene in genes.found.index}
    members = {gene for genes in sets.values() for gene in genes}
    folded = {gene.casefold() for gene in measured}
    alike = sum(gene.casefold() in folded for gene in members)
    text = f"{len(members & measured)} of its {len(members)} genes are among the measured ones"
    if alike > len(members & measured):
        text += f", {alike} but for capitals (human genes are written KRT8, those of mice Krt8)"
    else:
        text += f", which are written like {utils.some(sorted(measured))}"
    raise utils.StageError(
        f"{args.gene_sets}: no set has {args.min_size} to {args.max_size} measured genes; {text}.",
        "Take gene sets of the same species and kind of name, or change --min-size and --max-size.",
    )


def find_enriched(stage: utils.Stage) -> None:
    args = stage.args
    patterned = ((args.tables or stage.directory) / PATTERNS.name).is_file()
    files.guard_outputs(stage, *([] if patterned else [files.VENN]))
    if args.min_size > args.max_size:
        raise utils.StageError(
            f"--min-size {args.min_size} is above --max-size {args.max_size}.",
            "Give a smaller --min-size or a larger --max-size.",
        )
    sets = read_gmt(args.gene_sets)
    lists = read_lists(stage)
    parts = [examine(genes, sets, args.min_size, args.max_size) for genes in lists]
    table = pd.concat([p for p in parts if len(p)] or parts[:1], ignore_index=True)
    check_sets(stage, sets, lists, table)
    dropped = dropped_sets(sets, lists, table, (args.min_size, args.max_size))
    for why, names in dropped.items():
        n = f"{len(names)} of {len(sets)}"
        print(f"{n} gene sets are not tested, since they have {why}: {utils.some(names)}")
    found = summarise(lists, table, args.max_q)
    for name, numbers in found.items():
        if numbers["genes"] == 0 or numbers["sets tested"] == 0:
            stage.warn(f"{name}: {numbers['genes']} genes, {numbers['sets tested']} sets to test")
    panels = compare_findings(lists, table, args.max_q)
    facts = {
        "sets": len(sets),
        "max q": args.max_q,
        "log2 fold": args.log2_fold,
        "sizes": [args.min_size, args.max_size],
        "background of patterns": args.background,
        "lists": found,
    }
    if panels:
        facts["found by"] = {name: count_parts(*panel[1:]) for name, panel in panels.items()}
    best = table[table["q"] < args.max_q].groupby("list", sort=False).head(2)
    columns = ["list", "set", "size", "found", "ratio", "q"]
    regions.print_table(best[columns], "no gene set is enriched")
    regions.print_facts(facts)
    facts["dropped"] = dropped
    outputs: dict[utils.Artifact, Any] = {files.ENRICHMENT_TABLE: table}
    if not args.no_plot:
        outputs[files.ENRICHMENT_PICTURE] = draw_dots(table, [*found], args.max_q)
        if panels:
            outputs[files.VENN] = draw_venn(panels.values())
    regions.save(stage, outputs)
    stage.finish(**facts)


def run(argv: list[str] | None = None) -> int:
    return cli.run_stage(find_enriched, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
