"""Which gene sets are enriched among the genes of regions, and among those that have a pattern.

    python analysis/enrich.py --directory data/section --gene-sets h.all.v2024.1.Hs.symbols.gmt

Lists of genes come from markers.csv of segment.py, from patterns.csv of patterns.py, or from both:

* region 1, 2, ...: genes that are higher there by share and by count (as segment.py tells), with q
  below --level and a log2 fold change above --log2-fold; ranked by the lower of their two AUC.
  Every gene of cnts.csv that has a count could be there: these are the background.
* spots: genes whose measured counts have a pattern (found_by_spots), ranked by Moran's I. maps:
  genes whose map has one (found_by_maps), ranked by their correlation with unseen spots. Only genes
  with a map could be there. So these are the background, for the choice of genes to predict is no
  finding; with --background measured, all genes are that have a count.

--gene-sets is a GMT file as MSigDB, Enrichr and Reactome offer it: a set a line, its name, a
description and its genes, with tabs between them. Nothing is downloaded. Genes are matched by their
exact names; what is not in the background does not count, neither for the size of a set. Sets
smaller than --min-size or larger than --max-size are left out. Two tests are made:

* p: of the list with the set (over-representation), one-sided by the hypergeometric distribution,
  which is Fisher's exact test. ratio is the number found over the number expected.
* rank_p: of the ranks of all genes of the background, one-sided by the test of Mann and Whitney, so
  that no threshold is needed. rank_auc is the probability that a gene of the set has a higher rank
  than another gene; 0.5 is chance. Genes of a set vary together, which makes the plain test find
  too much; so its variance is that for a correlation of 0.01, as in limma's cameraPR.

q and rank_q are corrected for all sets tested on the same list (Benjamini and Hochberg). They are
about genes, not about tissue: that genes of a set go together in another section does not follow.

The tests are a few lines of scipy. gseapy 1.3.1 and decoupler 2.2.0 work without a network too, but
call what pandas 3.1 warns of; they bring 4 and 18 packages along, and decoupler is compiled for a
minute or two when first used. gseapy's p are the same. Its q are lower, by half at times, since it
does not count sets without any gene of the list.

Files in: markers.csv, patterns.csv (in --tables, if they are not in the sample's folder), cnts.csv.
Files out: enrichment.csv (a row per set and list), enrichment.png (the best sets of every list),
venn.png (genes, and sets enriched among them, by spots and by maps) and enrichment.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq
from scipy.sparse import csr_array

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from analysis import regions
from reading import tables

SCRIPT = "analysis/enrich.py"
LEVEL = 0.05  # of q
LOG2_FOLD = 0.5  # a region's genes have 1.4 times the counts of elsewhere, at least
MIN_SIZE, MAX_SIZE = 5, 500  # genes of a set, in the background; usual limits
CORRELATION = 0.01  # between the genes of a set, as in limma's cameraPR
MARKERS, PATTERNS = "markers.csv", "patterns.csv"
MADE_BY = {MARKERS: "analysis/segment.py", PATTERNS: "analysis/patterns.py"}
RECORDS = {MARKERS: "segments.json", PATTERNS: "patterns.json"}
COLUMNS = {
    MARKERS: ["region", "gene", "log2_fold", "auc", "auc_counts", "q", "higher"],
    PATTERNS: ["gene", "spots_I", "held_out_r", "found_by_spots", "found_by_maps"],
}
FLAGS = ("higher", "found_by_spots", "found_by_maps")  # columns of True and False
BY_SPOTS, BY_MAPS = "spots", "maps"
TOP, MOST_ROWS = 4, 40  # sets of a list, and of all, in the picture
LONGEST_NAME = 48  # characters of a set's name in the picture
COLOURS = {BY_SPOTS: "#4c78a8", BY_MAPS: "#e6a532"}  # which the colour-blind tell apart


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

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(f"cannot be read as text: {error}.") from error
    sets, line_of = {}, {}
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
    names, rows, columns = [], [], []
    for name, members in sets.items():
        at = genes.get_indexer(members)
        at = at[at >= 0]
        if smallest <= len(at) <= largest:
            rows.append(np.full(len(at), len(names)))
            columns.append(at)
            names.append(name)
    if not names:
        return [], csr_array((0, len(genes)))
    where = np.concatenate(rows), np.concatenate(columns)
    return names, csr_array((np.ones(len(where[0])), where), (len(names), len(genes)))


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
    variance = (
        pairs
        / (2 * np.pi)
        * (
            np.arcsin(1)
            + np.arcsin(0.5) * (others - 1)
            + np.arcsin(correlation / 2) * (size - 1) * (others - 1)
            + np.arcsin((1 + correlation) / 2) * (size - 1)
        )
    )
    ties = np.unique(ranks, return_counts=True)[1].astype(float)
    variance *= 1 - (ties**3 - ties).sum() / (n**3 - n)
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
    if not names:
        return pd.DataFrame(columns=ENRICHMENT)
    hits, expected, p = over_representation(member, found)
    auc, rank_p = rank_test(member, genes.statistic.reindex(ranked).to_numpy(float))
    both = member.multiply(found[None, :]).tocsr()
    both.eliminate_zeros()
    both.sort_indices()  # the genes of the highest rank first
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
            "genes": [
                ";".join(ranked[both.indices[a:b]])
                for a, b in zip(both.indptr[:-1], both.indptr[1:], strict=True)
            ],
        }
    )
    return table.sort_values(["p", "rank_p", "set"], kind="stable", ignore_index=True)


ENRICHMENT = [
    "source", "list", "set", "size", "found", "expected", "ratio", "p", "q", "rank_auc", "rank_p",
    "rank_q", "genes",
]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# lists of genes
# --------------------------------------------------------------------------------------------------
def read_findings(stage: utils.Stage, name: str) -> pd.DataFrame | None:
    """markers.csv or patterns.csv; None if it is not there."""
    path = (stage.args.tables or stage.directory) / name
    if not path.is_file():
        return None
    again = f'Run: python {MADE_BY[name]} --directory "{stage.directory}"'
    check_fresh(stage, path, again)
    wanted = COLUMNS[name]
    try:
        table = pd.read_csv(path, dtype={"gene": str}, keep_default_na=False, na_values={})
        table = table[wanted]
        numbers = [column for column in wanted if column not in ("gene", *FLAGS)]
        table = table.assign(**{c: pd.to_numeric(table[c].replace("", np.nan)) for c in numbers})
        for flag in set(FLAGS) & set(wanted):
            if len(table) and table[flag].dtype != bool:
                raise ValueError(f"{flag} is not True or False")
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise utils.StageError(
            f"{path} is not a table of {', '.join(wanted)}: {error!s:.200}", again
        ) from error
    if table.empty:
        raise utils.StageError(f"{path} holds no gene.", again)
    stage.inputs[name] = utils.fingerprint(path)
    return table


def check_fresh(stage: utils.Stage, path: Path, again: str) -> None:
    """A finding from other files than those of the sample is refused, as by the five scripts."""
    record = path.with_name(RECORDS[path.name])
    if not record.is_file():
        print(f"{path.name}: without {record.name}, taken as your own")
        return
    try:
        inputs = json.loads(record.read_text(encoding="utf-8"))["inputs"]
        changed = [
            n for n, known in inputs.items() if not utils.same_as(stage.directory / n, known)
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise utils.StageError(
            f"{record} is not a readable record: {error!r:.200}", again
        ) from error
    if changed and stage.args.allow_stale:
        print(f"{path.name}: out of date ({changed[0]} changed), used all the same")
    elif changed:
        raise utils.StageError(
            f"{path} is out of date: {stage.directory / changed[0]} has changed since "
            f"{MADE_BY[path.name]} read it.",
            f"{again} (or add --allow-stale to use it all the same).",
        )


def check_names(stage: utils.Stage, name: str, genes: pd.Index, measured: pd.Index) -> None:
    unknown = genes[~genes.isin(measured)]
    if len(unknown):
        raise utils.StageError(
            f"{(stage.args.tables or stage.directory) / name} has genes that "
            f"{stage.path(utils.CNTS).name} lacks: {utils.some(unknown)}.",
            f'Run: python {MADE_BY[name]} --directory "{stage.directory}"',
        )


def region_lists(markers: pd.DataFrame, measured: pd.Index, level: float, fold: float):
    """A list per region; genes of the background that were not tested have the lowest rank."""
    lists = []
    for region, table in markers.groupby("region"):
        table = table.set_index("gene").reindex(measured)
        found = (table["q"] < level) & (table["log2_fold"] > fold) & table["higher"].eq(True)
        lowest = table[["auc", "auc_counts"]].min(axis=1, skipna=False).fillna(0)
        lists.append(GeneList("markers", f"region {region:g}", found, lowest))
    return lists


def pattern_lists(patterns: pd.DataFrame, background: pd.Index) -> list[GeneList]:
    """Genes that the maps lack are not found, and have the lowest rank."""
    table = patterns.set_index("gene").reindex(background)
    return [
        GeneList("patterns", name, table[flag].eq(True), table[statistic].fillna(-1))
        for name, flag, statistic in (
            (BY_SPOTS, "found_by_spots", "spots_I"),
            (BY_MAPS, "found_by_maps", "held_out_r"),
        )
    ]


def read_lists(stage: utils.Stage) -> list[GeneList]:
    args = stage.args
    markers, patterns = read_findings(stage, MARKERS), read_findings(stage, PATTERNS)
    if markers is None and patterns is None:
        raise utils.StageError(
            f"Neither {MARKERS} nor {PATTERNS} is in {args.tables or stage.directory}.",
            f'Run: python {MADE_BY[MARKERS]} --directory "{stage.directory}" and '
            f'python {MADE_BY[PATTERNS]} --directory "{stage.directory}"',
        )
    locs = tables.read_locs(stage, stage.path(utils.LOCS))
    counts, names = tables.read_sparse_counts(stage, stage.path(utils.CNTS), locs.index)
    measured = pd.Index(names)
    lists = []
    for name, table in ((MARKERS, markers), (PATTERNS, patterns)):
        if table is None:
            print(f"without {name}: run {MADE_BY[name]} to have its genes as well")
            continue
        check_names(stage, name, pd.Index(table["gene"]), measured)
        key = ["region", "gene"] if name == MARKERS else ["gene"]
        if repeated := utils.duplicates(table[key].astype(str).agg(" ".join, axis=1)):
            raise utils.StageError(
                f"{(args.tables or stage.directory) / name} has {utils.some(repeated)} more than "
                f"once.",
                f'Run: python {MADE_BY[name]} --directory "{stage.directory}"',
            )
    counted = measured[np.asarray(counts.sum(axis=0)).ravel() > 0]
    if markers is not None:
        lists += region_lists(markers, counted, args.level, args.log2_fold)
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


def draw_venn(panels: list[tuple[str, set, set]]):
    """Two circles a panel: what spots find, what maps find."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, spots, maps) in zip(axes, panels, strict=True):
        regions.bare(ax, title)
        if spots | maps:
            draw_circles(ax, len(spots - maps), len(spots & maps), len(maps - spots))
        else:
            ax.text(0.5, 0.5, "none", ha="center", va="center", transform=ax.transAxes)
    return figure


def draw_circles(ax, only_spots: int, both: int, only_maps: int) -> None:
    """A count stands in its part, or beside it where the part is thin."""
    from matplotlib.patches import Circle

    a, b, distance = place_circles(only_spots + both, only_maps + both, both)
    widest, left, right = max(a, b), min(-a, distance - b), max(a, distance + b)
    for x, radius, name in ((0, a, BY_SPOTS), (distance, b, BY_MAPS)):
        if radius:
            ax.add_patch(Circle((x, 0), radius, facecolor=COLOURS[name], alpha=0.45, lw=0))
            ax.add_patch(Circle((x, 0), radius, fill=False, ec=COLOURS[name], lw=2))
    beside = 0.12 * widest
    for n, low, high, outside, align in (  # where a part lies on the line through both centres
        (only_spots, -a, min(a, distance - b), (left - beside, 0), "right"),
        (both, max(-a, distance - b), min(a, distance + b), (min(a, right), 0), "center"),
        (only_maps, max(a, distance - b), distance + b, (right + beside, 0), "left"),
    ):
        style = {"va": "center", "fontsize": 13}
        if n and (high - low > 0.35 * widest or align == "center"):
            ax.text((low + high) / 2, 0, str(n), ha="center", **style)
        elif n:
            ax.text(*outside, str(n), ha=align, **style)
    style = {"ha": "center", "va": "bottom", "fontsize": 11}
    middle, reach = (left + right) / 2, max(right - left, 3 * widest)
    for side, name, n, colour in (
        (-1, BY_SPOTS, only_spots + both, "#2f5680"),
        (1, BY_MAPS, only_maps + both, "#8a5a00"),
    ):
        x = middle + side * 0.27 * reach
        ax.text(x, 1.1 * widest, f"by {name}: {n}", color=colour, **style)
    ax.set(
        xlim=(middle - 0.6 * reach, middle + 0.6 * reach),
        ylim=(-1.1 * widest, 1.4 * widest),
        aspect="equal",
    )


def best_sets(table: pd.DataFrame, names: list[str]) -> list[str]:
    """The best sets of every list, those of the first list first; fewer of each if too many."""
    best = []
    for top in range(TOP, 0, -1):
        parts = [table.loc[table["list"] == name, "set"].head(top) for name in names]
        best = list(dict.fromkeys(pd.concat(parts)))
        if len(best) <= MOST_ROWS:
            break
    return best[:MOST_ROWS]


def draw_dots(table: pd.DataFrame, names: list[str], level: float):
    """Sets by lists: a dot's size is the share of the set that is found, its colour is q."""
    from matplotlib.figure import Figure

    found, sure = table[table["found"] > 0], table[table["q"] < level]
    shown = best_sets(sure if len(sure) else found, names)
    found, sure = (part[part["set"].isin(shown)] for part in (found, sure))
    column, row = ({name: i for i, name in enumerate(group)} for group in (names, shown))
    height = 0.27 * max(len(shown), 5) + 2.0  # inches
    figure = Figure(figsize=(0.55 * len(names) + 7.0, height), layout="constrained", dpi=110)
    ax = figure.subplots()

    def dots(part: pd.DataFrame, **style):
        size = dot_size(part["found"] / part["size"])
        return ax.scatter(part["list"].map(column), part["set"].map(row), s=size, **style)

    dots(found, color="0.92", edgecolors="0.75", linewidths=0.6)
    strength = -np.log10(sure["q"].clip(lower=1e-300))
    low = -np.log10(level)
    top = max(float(strength.max()), low + 1) if len(sure) else low + 1
    drawn = dots(sure, c=strength, cmap="viridis_r", vmin=low, vmax=top, edgecolors="black")
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_yticks(range(len(shown)), [shortened(name) for name in shown], fontsize=8)
    ax.set(xlim=(-0.6, len(names) - 0.4), ylim=(max(len(shown), 1) - 0.4, -0.6))
    ax.grid(color="0.93")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    title = "best gene sets of every list" if len(sure) else "no gene set is enriched"
    ax.set_title(f"{title}; grey: q of {level:g} and more", fontsize=10)
    if len(sure):
        figure.colorbar(drawn, ax=ax, label="$-\\log_{10}$ q", shrink=0.7, aspect=15)
    for share in (0.25, 0.5, 1.0):
        ax.scatter([], [], s=dot_size(share), color="0.6", label=f"{share:.0%}")
    style = {"loc": "outside right upper", "frameon": False, "fontsize": 8, "labelspacing": 1.2}
    figure.legend(title="of the set\nis found", **style)
    return figure


def dot_size(share):
    return 15 + 200 * share


def shortened(name: str) -> str:
    name = name.replace("_", " ")
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------
def enriched(table: pd.DataFrame, name: str, level: float) -> set[str]:
    return set(table.loc[(table["list"] == name) & (table["q"] < level), "set"])


def summarise(lists: list[GeneList], table: pd.DataFrame, level: float) -> dict:
    found = {}
    for genes in lists:
        part = table[table["list"] == genes.name]
        found[genes.name] = {
            "genes": int(genes.found.sum()),
            "background": len(genes.found),
            "sets tested": len(part),
            "enriched": int((part["q"] < level).sum()),
            "enriched by ranks": int((part["rank_q"] < level).sum()),
        }
    return found


def compare_findings(lists: list[GeneList], table: pd.DataFrame, level: float):
    """Panels of venn.png: genes and sets by spots and by maps; none without patterns."""
    by = {genes.name: genes for genes in lists if genes.source == "patterns"}
    if not by:
        return []
    genes = [set(by[name].found.index[by[name].found]) for name in (BY_SPOTS, BY_MAPS)]
    sets = [enriched(table, name, level) for name in (BY_SPOTS, BY_MAPS)]
    return [
        (f"genes with a pattern, of {len(by[BY_SPOTS].found)}", *genes),
        (f"gene sets enriched among them (q < {level:g})", *sets),
    ]


def count_venn(panels: list[tuple[str, set, set]]) -> dict:
    return {
        name: {
            "spots only": len(spots - maps),
            "both": len(spots & maps),
            "maps only": len(maps - spots),
        }
        for name, (_, spots, maps) in zip(("genes", "sets"), panels, strict=False)
    }


def report(found: dict, table: pd.DataFrame, level: float) -> str:
    lines = [f"{'list':<12}{'genes':>6}{'of':>7}{'sets':>6}{'enriched':>9}{'by ranks':>9}  best"]
    for name, facts in found.items():
        part = table[(table["list"] == name) & (table["q"] < level)].head(2)
        best = ", ".join(f"{row.set} {row.q:.1g}" for row in part.itertuples())
        lines.append(
            f"{name:<12}{facts['genes']:>6}{facts['background']:>7}{facts['sets tested']:>6}"
            f"{facts['enriched']:>9}{facts['enriched by ranks']:>9}  {best or 'none'}"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = regions.parser_of(__doc__)
    option = parser.add_argument
    option("--gene-sets", type=Path, required=True, help="Gene sets, a GMT file.")
    option(
        "--tables",
        type=Path,
        help=f"Folder of {MARKERS} and {PATTERNS}; without it, the sample's own.",
    )
    option(
        "--level",
        type=regions.not_below_zero,
        default=LEVEL,
        help=f"q below which a gene or a set is found; without it, {LEVEL}.",
    )
    option(
        "--log2-fold",
        type=regions.not_below_zero,
        default=LOG2_FOLD,
        help=f"Log2 fold change that genes of a region exceed; without it, {LOG2_FOLD}.",
    )
    option(
        "--background",
        choices=["maps", "measured"],
        default="maps",
        help="Genes with which those that have a pattern are compared; without it, those of maps.",
    )
    option(
        "--min-size",
        type=utils.positive,
        default=MIN_SIZE,
        help=f"Least genes of a set in the background; without it, {MIN_SIZE}.",
    )
    option(
        "--max-size",
        type=utils.positive,
        default=MAX_SIZE,
        help=f"Most genes of a set in the background; without it, {MAX_SIZE}.",
    )
    return parser


def check_sets(stage: utils.Stage, sets: dict, lists: list[GeneList], table: pd.DataFrame) -> None:
    """Some set must be left to test; the reason is mostly another way to write gene names."""
    if not table.empty:
        return
    args = stage.args
    measured = set().union(*(genes.found.index for genes in lists))
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


def run_enrichment(stage: utils.Stage) -> None:
    args = stage.args
    regions.check_output(stage)
    if args.min_size > args.max_size:
        raise utils.StageError(
            f"--min-size {args.min_size} is above --max-size {args.max_size}.",
            "Give a smaller --min-size or a larger --max-size.",
        )
    sets = read_gmt(args.gene_sets)
    stage.inputs[args.gene_sets.name] = utils.fingerprint(args.gene_sets)
    stage.require(utils.LOCS, utils.CNTS)
    lists = read_lists(stage)
    parts = [examine(genes, sets, args.min_size, args.max_size) for genes in lists]
    table = pd.concat([p for p in parts if len(p)] or parts[:1], ignore_index=True)
    check_sets(stage, sets, lists, table)
    found = summarise(lists, table, args.level)
    for name, facts in found.items():
        if facts["genes"] == 0 or facts["sets tested"] == 0:
            stage.warn(f"{name}: {facts['genes']} genes, {facts['sets tested']} sets to test")
    panels = compare_findings(lists, table, args.level)
    facts = {
        "sets": len(sets),
        "level": args.level,
        "log2 fold": args.log2_fold,
        "sizes": [args.min_size, args.max_size],
        "background of patterns": args.background,
        "lists": found,
        **({"found by": count_venn(panels)} if panels else {}),
    }
    print(report(found, table, args.level))
    figures = {}
    if not args.no_plot:
        figures["enrichment"] = draw_dots(table, [genes.name for genes in lists], args.level)
        if panels:
            figures["venn"] = draw_venn(panels)
    regions.write(stage, "enrichment", facts, None, {"enrichment.csv": table}, figures)


def main(argv: list[str] | None = None) -> int:
    return utils.run_stage(run_enrichment, SCRIPT, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
